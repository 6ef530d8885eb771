"""What the sidecar adds: time to the first token, and throughput at 32 streams, beside the guarded engine itself.

python -m benchmarks.sidecar --out runs/bench/sidecar.json

One `serve` on the demo model. Every request is streamed twice, through the sidecar and straight to the engine behind it
(which guards it too), greedily, so that both say the same; the order of the two changes from turn to turn.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.chaos_serve import Serve
from classifiers.stats import Rate, bootstrap
from demo.model import reasoner_model
from demo.topics import load_topics

STREAMS = 32
ARMS = ("sidecar", "engine")


@dataclass(frozen=True)
class Plan:
    """How much is run: `turns` of 32 streams in each arm, and `alone` requests one at a time."""

    turns: int = 8
    alone: int = 80
    tokens: int = 96


QUICK = Plan(turns=2, alone=8, tokens=32)


@dataclass(frozen=True)
class Streamed:
    """One reply: seconds from the request to its first text, and how many tokens it had."""

    first: float
    tokens: int


async def stream(client: httpx.AsyncClient, model: str, request: str, tokens: int) -> Streamed:
    """Streams one reply and reads no more of it than is measured."""
    body = {
        "model": model, "messages": [{"role": "user", "content": request}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    first, said = float("nan"), 0
    began = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if first != first and _has_text(line):
                first = time.perf_counter() - began
            elif '"usage":{' in line:
                said = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    if not said:
        raise RuntimeError("a reply came without its usage")
    return Streamed(first, said)


def _has_text(line: str) -> bool:
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return any(choice["delta"].get(name) for choice in choices for name in ("content", "reasoning"))


async def measure(clients: dict[str, httpx.AsyncClient], plan: Plan, console: Console) -> dict[str, Any]:
    """All figures of a running server; both arms' clients have the same names as `ARMS`."""
    model = (await clients["sidecar"].get("/v1/models")).json()["data"][0]["id"]
    requests = [topic.request for topic in load_topics("report")]
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    crowded: dict[str, list[float]] = {arm: [] for arm in ARMS}
    alone: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for client in clients.values():
        # Prefix caches, connections and compiled paths are warm for both.
        await asyncio.gather(*(stream(client, model, text, 16) for text in requests))
    with Progress(console=console) as bar:
        task = bar.add_task("one stream at a time", total=plan.alone)
        for turn in range(plan.alone):
            for arm in _order(turn):
                reply = await stream(clients[arm], model, requests[turn % len(requests)], 4)
                alone[arm].append(reply.first)
            bar.advance(task)
        task = bar.add_task(f"{STREAMS} streams", total=plan.turns)
        for turn in range(plan.turns):
            batch = [requests[(turn * STREAMS + number) % len(requests)] for number in range(STREAMS)]
            for arm in _order(turn):
                began = time.perf_counter()
                replies = await asyncio.gather(*(stream(clients[arm], model, text, plan.tokens) for text in batch))
                speeds[arm].append(sum(reply.tokens for reply in replies) / (time.perf_counter() - began))
                crowded[arm] += [reply.first for reply in replies]
            bar.advance(task)
    return {
        "throughput_ratio": _of_pairs(np.divide(speeds["sidecar"], speeds["engine"])).model_dump(),
        "tokens_per_s": {arm: float(np.median(found)) for arm, found in speeds.items()},
        "first_token_added_ms": _of_pairs(1000 * np.subtract(alone["sidecar"], alone["engine"])).model_dump(),
        "first_token_ms": {arm: _percentiles(found) for arm, found in alone.items()},
        "first_token_added_ms_at_32": _of_pairs(1000 * np.subtract(crowded["sidecar"], crowded["engine"])).model_dump(),
        "first_token_ms_at_32": {arm: _percentiles(found) for arm, found in crowded.items()},
    }


def _order(turn: int) -> Sequence[str]:
    return ARMS if turn % 2 == 0 else ARMS[::-1]


def _of_pairs(values: Any) -> Rate:
    """The median of what was measured in pairs, with a bootstrapped interval."""
    return bootstrap(lambda found: float(np.median(found)), list(values))


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) for q in (50, 95)}


async def _run(serve: Serve, plan: Plan, console: Console) -> dict[str, Any]:
    engine, key = serve.direct()
    limits, long = httpx.Limits(max_connections=None), httpx.Timeout(600)
    async with (
        httpx.AsyncClient(base_url=serve.url, timeout=long, limits=limits, trust_env=False) as sidecar,
        httpx.AsyncClient(
            base_url=engine, timeout=long, limits=limits, trust_env=False, headers={"authorization": f"Bearer {key}"}
        ) as direct,
    ):
        return await measure({"sidecar": sidecar, "engine": direct}, plan, console)


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/sidecar.json"),
    quick: Annotated[bool, typer.Option(help="A few turns, to try it; no figures to report.")] = False,
) -> None:
    """Measure what the sidecar adds to the guarded engine and print it."""
    console, plan = Console(stderr=True), QUICK if quick else Plan()
    with tempfile.TemporaryDirectory() as scratch:
        serve = Serve(str(reasoner_model()), Path(scratch) / "traces", Path(scratch) / "log", ())
        with console.status("starting serve"):
            serve.start()
        try:
            found = asyncio.run(_run(serve, plan, console))
        finally:
            serve.stop()
    found |= {"quick": quick, "streams": STREAMS, "turns": plan.turns, "alone": plan.alone, "tokens": plan.tokens}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print_json(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
