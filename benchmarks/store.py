"""What feeding a store costs the event loop that answers requests, and how fast a store catches up.

A backlog of traces is fed by the real feeder thread while an event loop does what the sidecar does for a stream: it
wakes up, handles a chunk of JSON and sleeps again. How late it wakes is compared with the same loop alone, in
interleaved rounds.

    python -m benchmarks.store --out runs/bench/store.json
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from guard.sidecar.feeder import Feeder
from guard.sidecar.metrics import Metrics
from guard.store.ingest import Ingester
from guard.store.store import Store
from guard.traces import Receipt, Spool, StepRecord, Trace

TOKENS, STEPS = 800, 30
"""Of one trace: a reasoning of middle length."""
_EVERY = 0.005
_CHUNK = json.dumps({"choices": [{"index": 0, "delta": {"reasoning": " token"}}], "id": "c", "model": "m"})


def trace(number: int) -> Trace:
    """One of the backlog."""
    width = TOKENS // STEPS
    receipt = Receipt(
        guard_id=f"b{number}", policy="default", policy_hash="0" * 12, detector="d", engine="vllm-v1", seen=STEPS,
        scored=STEPS,
    )  # fmt: skip
    return Trace(
        guard_id=receipt.guard_id, created=float(number), model="m", tokenizer_hash="t", request="What is this? " * 20,
        prompt_ids=list(range(60)), output_ids=[(i * 7919 + number) % 50_000 for i in range(TOKENS)], receipt=receipt,
        steps=[
            StepRecord(start=i * width, end=(i + 1) * width, zone="reasoning", score=0.01 * i, cue=False)
            for i in range(STEPS)
        ],
    )  # fmt: skip


async def lateness(seconds: float) -> list[float]:
    """How much later than asked each wake-up came, in milliseconds."""
    found = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await asyncio.sleep(_EVERY)
        json.loads(_CHUNK)
        found.append((time.perf_counter() - began - _EVERY) * 1000)
    return found


def catch_up(directory: Path, url: str) -> float:
    """Traces a second into an empty store, by hand and without a pause."""
    store = Store.open(url, migrate=True)
    began = time.perf_counter()
    fed = Ingester(store, directory).run()
    store.close()
    return fed.traces / (time.perf_counter() - began)


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path("runs/bench/store.json"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Of one half round.")] = 2.0,
) -> None:
    """Measures, prints and writes."""
    alone, beside, by_hand = list[float](), list[float](), list[float]()
    metrics = Metrics()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            spool = Spool(directory)
            for number in range(int(500 * seconds)):
                spool.append(trace(number))
            by_hand.append(catch_up(directory, f"sqlite:///{directory}/hand.db"))
            alone += asyncio.run(lateness(seconds))
            with Feeder(directory, f"sqlite:///{directory}/beside.db", metrics):
                beside += asyncio.run(lateness(seconds))
    figures = {
        "traces_fed_meanwhile": metrics.registry.get_sample_value("reasonguard_store_traces_total"),
        "traces_per_second_by_hand": [round(each, 1) for each in by_hand],
        "milliseconds_late": {"alone": _shares(alone), "beside_the_feeder": _shares(beside)},
    }
    typer.echo(json.dumps(figures, indent=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _shares(values: list[float]) -> dict[str, float]:
    return {"n": len(values)} | {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99, 100)}


if __name__ == "__main__":
    typer.run(main)
