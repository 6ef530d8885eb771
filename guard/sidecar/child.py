"""`serve` as a child process, for commands that need a running server: the demo's traffic, doctor's proof."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from guard.engine.launch import free_port
from guard.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
READY_SECONDS = 300
STOP_SECONDS = 30


@contextlib.contextmanager
def serving(model: str, traces: Path, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a `serve` that has proven itself; it is stopped at the end. UserError when it does not get ready.

    `traces` is where it writes, `log` takes what it prints, `options` are more of its arguments.
    """
    port = free_port()
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--model", model, "--traces", str(traces)]
    command += ["--port", str(port), *options]
    with log.open("ab") as sink:
        server = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=dict(os.environ))
    try:
        _wait_ready(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        server.kill()
        server.wait()


def _wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"serve ended with exit code {server.returncode}", fix=f"See {log}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise UserError(f"serve was not ready within {READY_SECONDS} s", fix=f"See {log}")
