"""The whole loop on the demo model: serve with the guard, log, align, measure: what `make demo` runs.

Traffic goes through a real `cli.py serve` over HTTP. Every stage resumes: run it again after an interruption and it
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

from align import pipeline
from align.requests import built_in
from align.train import TrainSettings
from demo.model import reasoner_model
from demo.topics import load_topics
from guard.errors import UserError
from guard.traces import read_traces

ROOT = Path(__file__).resolve().parent.parent
#: Requests in flight: enough to fill the engine's batch.
CONCURRENCY = 96
READY_SECONDS = 300


def main(out: Path, seed: int = 0) -> None:
    """Serves the `align` topics with the guard on, aligns on the traces, measures on the `report` topics."""
    console = Console(stderr=True)
    with console.status("making the demo reasoner ready (once, about 30 s)"):
        model = str(reasoner_model())
    traces = out / "traces"
    settings = pipeline.AlignSettings(model=model, seed=seed, train=TrainSettings(seed=seed))
    with pipeline.Workbench.open(settings, out) as bench:
        requests = traffic()
        if not (out / "traffic.done").exists():
            send(model, requests, traces, console)
            (out / "traffic.done").write_text(f"{len(requests)} requests\n", encoding="utf-8")
        pairs = pipeline.make_pairs(bench, pipeline.collect(bench, traces))
        held_out = built_in(bench.prompt)
        pipeline.evaluate_base(bench, held_out)
        report = pipeline.train_adapter(bench, pairs)
        console.print(f"trained on {report.pairs} pairs in {report.seconds:.0f} s")
        pipeline.measure(bench, held_out)
    console.print(f"report: {out / 'report.html'} and {out / 'report.json'}")


def traffic() -> list[str]:
    """What the demo's users ask: every `align` topic, in its first wording."""
    return [topic.request for topic in load_topics("align")]


def send(model: str, requests: list[str], traces: Path, console: Console) -> None:
    """Starts `serve`, sends all requests to it, stops it; every answered request leaves a trace."""
    traces.mkdir(parents=True, exist_ok=True)
    with _serving(model, traces, console) as url, Progress(console=console) as bar:
        task = bar.add_task("serving with the guard", total=len(requests))
        with ThreadPoolExecutor(CONCURRENCY) as pool, httpx.Client(base_url=url, timeout=600) as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            for _ in pool.map(lambda request: _ask(client, name, request), requests):
                bar.advance(task)
    found, _ = read_traces(traces)
    if len(found) < len(requests):
        raise UserError("The guarded server lost traces", got=f"{len(found)} traces", wanted=f"{len(requests)}")


def _ask(client: httpx.Client, model: str, request: str) -> None:
    body = {
        "model": model, "messages": [{"role": "user", "content": request}], "max_tokens": 160, "temperature": 0.6,
        "top_k": 20,
    }  # fmt: skip
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise UserError(f"The guarded server answered {response.status_code}", got=response.text[:300])


@contextlib.contextmanager
def _serving(model: str, traces: Path, console: Console) -> Iterator[str]:
    port = _free_port()
    command = [
        sys.executable, str(ROOT / "cli.py"), "serve", "--model", model, "--traces", str(traces), "--port", str(port),
    ]  # fmt: skip
    log = traces.parent / "serve.log"
    with log.open("ab") as sink:
        server = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=dict(os.environ))
    try:
        with console.status("starting serve: vLLM, the guard, a real injection as proof"):
            _wait_ready(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def _wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"serve ended with exit code {server.returncode}", fix=f"See {log}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise UserError(f"serve was not ready within {READY_SECONDS} s", fix=f"See {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
