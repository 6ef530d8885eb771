"""Exchanging weights under traffic: is the output that of a fresh engine, and how long does a request wait?

    python -m benchmarks.exchange --run runs/demo --out runs/bench/exchange.json

One `serve` follows a registry. Greedy replies to held-out requests are read on the model as it came, on the run's
version after it was promoted, and after the rollback; a fresh `serve` on the merged model gives the replies to compare
with. Requests go one at a time, so that batches are the same. While a change is under way one-token requests go on, and
the longest wait among them is the pause.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from align.gate import Criterion, GateSettings
from align.pipeline import AlignSettings
from align.promote import promote, roll_back
from align.versions import locked
from classifiers.stats import Rate
from demo.topics import load_topics
from guard.sidecar.child import serving

REQUESTS = 16
TOKENS = 120
#: Any run will do.
OPEN = GateSettings(criteria=(Criterion(figure="aligned.reasoning_harm", bound="point", at_most=1.0),), not_worse=())
Reply = tuple[str, str, int]
"""Reasoning, answer, and the version that wrote them."""


def main(
    run: Annotated[Path, typer.Option(help="A finished run of the aligner.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/exchange.json"),
) -> None:
    """Compare and time."""
    model = AlignSettings.model_validate_json((run / "align.json").read_bytes()).model
    topics = [topic.request for topic in load_topics("align")][:REQUESTS]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        with locked(work / "versions") as registry:
            options = ["--versions", str(work / "versions")]
            with serving(model, work / "traces", work / "serve.log", options) as url, client(url) as http:
                base = [reply(http, topic) for topic in topics]
                version = promote(registry, run, OPEN).version or 0
                loading = pause(http, version)
                aligned = [reply(http, topic) for topic in topics]
                roll_back(registry)
                restoring = pause(http, 0)
                again = [reply(http, topic) for topic in topics]
            merged = str(registry.model(version))
            with serving(merged, work / "fresh", work / "fresh.log") as url, client(url) as http:
                fresh = [reply(http, topic) for topic in topics]
    report = {
        "model": Path(model).name,
        "requests": len(topics),
        "changed_by_the_version": share(aligned, base, same=False),
        "equal_to_a_fresh_engine": share(aligned, fresh),
        "restored_by_the_rollback": share(again, base),
        "usual_seconds": loading[0],
        "longest_wait_seconds": {"promote": loading[1], "rollback": restoring[1]},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    typer.echo(json.dumps(report, indent=1))


def client(url: str) -> httpx.Client:
    """A client that waits out an exchange."""
    return httpx.Client(base_url=url, trust_env=False, timeout=120)


def reply(http: httpx.Client, request: str, tokens: int = TOKENS) -> Reply:
    """The greedy reply."""
    body = {"messages": [{"role": "user", "content": request}], "temperature": 0, "max_tokens": tokens}
    answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    message = answer["choices"][0]["message"]
    version = answer["reasonguard"].get("version", -1)
    return str(message.get("reasoning")), str(message.get("content")), int(version)


def pause(http: httpx.Client, version: int) -> tuple[float, float]:
    """(seconds of a one-token request at rest, the longest wait of one until the version answers)."""
    waits = []
    while True:
        began = time.perf_counter()
        found = reply(http, "Hello", 1)[2]
        waits.append(time.perf_counter() - began)
        if found == version:
            return sorted(waits)[len(waits) // 2], max(waits)


def share(
    ours: list[tuple[str, str, int]], theirs: list[tuple[str, str, int]], *, same: bool = True
) -> dict[str, float]:
    """How many replies are equal (or not) in every character, with the interval."""
    hits = sum((a[:2] == b[:2]) is same for a, b in zip(ours, theirs, strict=True))
    return Rate.of(hits, len(ours)).model_dump()


if __name__ == "__main__":
    typer.run(main)
