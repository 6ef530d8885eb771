"""What the detector costs: each tier on the authored test steps, interleaved; on one thread, and batches on several.

python -m benchmarks.detector --out runs/bench/detector.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from classifiers.corpus import part_of
from classifiers.detector import Detector
from classifiers.encoder import MAX_TOKENS
from classifiers.labels import read_authored

STEPS = 600
BATCH, WORKERS = 8, (1, 2, 4)
"""Steps that the encoder reads in one call, and on how many threads."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/detector.json"),
    model: Annotated[Path | None, typer.Option(help="Artifact directory; by default the shipped one.")] = None,
) -> None:
    """Time the first tier, the encoder and a whole step; a step's predecessor is in the cache, as it is live."""
    detector = Detector.load(model)
    traces = [trace for trace in read_authored() if part_of(trace) == "test"]
    steps = [(trace.request, step) for trace in traces for step in trace.steps][:STEPS]
    contexts = {request: detector.request(request) for request, _ in steps}
    embed = detector.encoder.embed
    previous = "The step before this one."
    embed(previous)
    # A number in front makes each text new to the cache.
    kinds: dict[str, Callable[[str, str], object]] = {
        "first tier": lambda _, step: detector.first_tier([step]),
        "encoder, one step": lambda _, step: embed(step + " 1"),
        "step, encoder alone": lambda request, step: detector.score(
            contexts[request], [step + " 2"], previous, first_tier=False
        ),
        "step, both tiers": lambda request, step: detector.score(contexts[request], [step + " 3"], previous),
        "request": lambda request, step: detector.request(f"{request} {len(step)} {step[:12]}"),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for request, step in track(steps, "Timing", console=Console(stderr=True), transient=True):
        for name, run in kinds.items():
            start = time.perf_counter()
            run(request, step)
            times[name].append((time.perf_counter() - start) * 1e3)
    times |= _batches(model, steps)
    longest = " ".join(["word"] * (MAX_TOKENS - 3))
    times[f"encoder, {MAX_TOKENS} tokens"] = [_once(lambda n=n: embed(f"{longest} {n}")) for n in range(60)]
    table = Table("milliseconds", "p50", "p95", "n", title=detector.version)
    found = {}
    for name, values in times.items():
        p50, p95 = (float(np.percentile(values, q)) for q in (50, 95))
        found[name] = {"p50_ms": p50, "p95_ms": p95, "n": len(values)}
        table.add_row(name, f"{p50:.3f}", f"{p95:.3f}", str(len(values)))
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _batches(model: Path | None, steps: list[tuple[str, str]]) -> dict[str, list[float]]:
    """Milliseconds of one call with `BATCH` steps, none of which the first tier clears, by the number of threads."""
    detectors = {workers: Detector.load(model, workers) for workers in WORKERS}
    contexts = {workers: detector.request(steps[0][0]) for workers, detector in detectors.items()}
    times: dict[str, list[float]] = {f"{BATCH} steps, {workers} threads": [] for workers in WORKERS}
    for start in range(0, len(steps) // 2, BATCH):
        said = [step for _, step in steps[start : start + BATCH]]
        for (workers, detector), found in zip(detectors.items(), times.values(), strict=True):
            context = contexts[workers]
            found.append(_once(lambda d=detector, c=context, s=said: d.score(c, s, first_tier=False)))
    return times


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    typer.run(main)
