"""The whole loop on the demo model: serve with the guard, log, align, measure: what `make demo` runs.

Traffic goes through a real `cli.py serve` over HTTP. Every stage resumes: run it again after an interruption and it
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

from align import pipeline
from align.requests import built_in
from demo.model import reasoner_model
from demo.topics import load_topics
from guard.errors import UserError
from guard.sidecar.child import serving
from guard.traces import read_traces

#: Requests in flight: enough to fill the engine's batch.
CONCURRENCY = 96


def main(out: Path, seed: int = 0) -> None:
    """Serves the `align` topics with the guard on, aligns on the traces, measures on the `report` topics."""
    console = Console(stderr=True)
    with console.status("making the demo reasoner ready (once, about 30 s)"):
        model = str(reasoner_model())
    traces = out / "traces"
    settings = pipeline.AlignSettings(model=model, seed=seed)
    with pipeline.Workbench.open(settings, out) as bench:
        requests = traffic()
        if not (out / "traffic.done").exists():
            # Both engines' start is imports on one core: side by side they take little more than one.
            bench.generator("base").start()
            send(model, requests, traces, console)
            (out / "traffic.done").write_text(f"{len(requests)} requests\n", encoding="utf-8")
        pairs = pipeline.make_pairs(bench, pipeline.collect(bench, traces))
        pipeline.train_and_measure(bench, pairs, built_in(bench.prompt))
    console.print(f"report: {out / 'report.html'} and {out / 'report.json'}")


def traffic() -> list[str]:
    """What the demo's users ask: every `align` topic, in its first wording."""
    return [topic.request for topic in load_topics("align")]


def send(model: str, requests: list[str], traces: Path, console: Console) -> None:
    """Starts `serve`, sends all requests to it, stops it; every answered request leaves a trace."""
    traces.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with console.status("starting serve: vLLM, the guard, a real injection as proof"):
            url = stack.enter_context(serving(model, traces, traces.parent / "serve.log"))
        bar = stack.enter_context(Progress(console=console))
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
