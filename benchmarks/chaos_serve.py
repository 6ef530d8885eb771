"""What `benchmarks.chaos` breaks: a real `cli.py serve` that can be killed, and a disk that can be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from guard.engine.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 600.0
SETTLE_SECONDS = 60.0
SCRIPT = (str(ROOT / "cli.py"),)
ENGINE = "vllm.entrypoints.openai.api_server"
WAITING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
OWN = ("reasonguard_requests_in_flight",)


class Lost(Exception):
    """A server that did not get ready, or did not settle: a hang."""


class Serve:
    """`serve` on one port and one traces directory, started as often as it is killed. `script` and `engine`: what is
    run in `cli.py`'s place, and what its engine's command line has in it."""

    def __init__(
        self, model: str, traces: Path, log: Path, options: tuple[str, ...], script: tuple[str, ...] = SCRIPT,
        engine: str = ENGINE,
    ) -> None:  # fmt: skip
        self.traces, self._log, self._port, self._engine = traces, log, free_port(), engine
        self.url = f"http://127.0.0.1:{self._port}"
        command = [sys.executable, *script, "serve", "--model", model, "--traces", str(traces)]
        self._command = [*command, "--port", str(self._port), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it in a process group of its own, and waits until it has proven itself."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.wait_ready()

    def wait_ready(self) -> None:
        """Asks `/ready` until it is; Lost after ten minutes, or when the server has ended."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise Lost(f"serve has ended; see {self._log}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/ready", timeout=90, trust_env=False).status_code == 200:
                    return
            time.sleep(0.5)
        raise Lost(f"serve was not ready within {READY_SECONDS:.0f} s; see {self._log}")

    def engine(self) -> psutil.Process:
        """The engine's server, which is its group's first process."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children(recursive=True):
            if self._engine in child.cmdline():
                return child
        raise Lost("serve has no engine")

    def kill_engine(self) -> None:
        """SIGKILL to everything of the engine; `serve` lives."""
        os.killpg(self.engine().pid, signal.SIGKILL)

    def kill(self, *, engine_too: bool) -> int:
        """SIGKILL to the group of `serve`, and to the engine's in the same moment or not; returns how many processes of
        the engine were there a minute later."""
        assert self._process is not None
        engine = self.engine()
        processes = [engine, *engine.children(recursive=True)]
        os.killpg(self._process.pid, signal.SIGKILL)
        if engine_too:
            os.killpg(engine.pid, signal.SIGKILL)
        self._process.wait()
        _, left = psutil.wait_procs(processes, timeout=60)
        for process in left:
            process.kill()
        return len(left)

    def stop(self) -> int | None:
        """SIGTERM; the exit code, or None when it had to be killed."""
        if self._process is None or self._process.poll() is not None:
            return self._process.returncode if self._process else None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill(engine_too=True)
            return None

    def leaked(self) -> int:
        """Requests that the engine and the sidecar still hold when no client is there any more, a minute later."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := self._held()) and time.monotonic() < deadline:
            time.sleep(0.25)
        return left

    def direct(self) -> tuple[str, str]:
        """The engine's own URL and key, past the sidecar."""
        engine = self.engine()
        arguments = engine.cmdline()
        return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}", engine.environ()["VLLM_API_KEY"]

    def _held(self) -> int:
        url, key = self.direct()
        page = _page(f"{url}/metrics", {"authorization": f"Bearer {key}"})
        return _sum(page, WAITING) + _sum(_page(f"{self.url}/metrics", {}), OWN)


def _page(url: str, headers: dict[str, str]) -> str:
    return httpx.get(url, headers=headers, timeout=60, trust_env=False).raise_for_status().text


def _sum(page: str, names: tuple[str, ...]) -> int:
    """The gauges' values together; a gauge that is not there would be a lie, so it is an error."""
    found = {name: 0.0 for name in names}
    seen = set()
    for line in page.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in found:
            seen.add(name)
            found[name] += float(line.rsplit(" ", 1)[1])
    if seen != set(names):
        raise Lost(f"/metrics lacks {', '.join(sorted(set(names) - seen))}")
    return int(sum(found.values()))


@contextlib.contextmanager
def small_disk(where: Path, mebibytes: int) -> Iterator[str | None]:
    """Mounts a tmpfs of that size while entered; yields None, or why it could not be (it needs root)."""
    where.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    made = subprocess.run(
        [mount or "mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "reasonguard-chaos", str(where)],
        capture_output=True, text=True, check=False,
    ) if mount else None  # fmt: skip
    if made is None or made.returncode:
        yield (made.stderr.strip() if made else "") or "no tmpfs can be mounted"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Takes the disk's last byte while entered."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"\0" * 65536)
    with filler.open("ab", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"\0")
    try:
        yield
    finally:
        filler.unlink()
