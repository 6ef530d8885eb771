"""Training on pairs, ours against stock TRL: interleaved in one process, on the demo's kind of pairs.

python -m benchmarks.align --out runs/bench/align.json
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from align.recipe import DEFAULT, read_stages
from demo.model import reasoner_model

TRAINERS = ("ours", "trl", "trl, references first")
SHARES = {"as in the demo": 0.0, "prefix 3/4 of the row": 0.75}
EPOCHS = read_stages(DEFAULT)[-1].epochs
"""Of the default recipe's last stage: what is computed once is shared by as many."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/align.json"),
    rounds: Annotated[int, typer.Option(min=2, help="Repeats of each trainer; medians are reported.")] = 5,
) -> None:
    """Time each trainer's steps and references on the same pairs, in turns; then take each one's peak memory alone."""
    from benchmarks.align_rig import Contender, demo_source

    # The trainers report every loop; the table is what matters here.
    logging.disable(logging.WARNING)
    model, found = str(reasoner_model()), {}
    with Progress(console=Console(stderr=True), transient=True) as bar, tempfile.TemporaryDirectory() as scratch:
        task = bar.add_task("training in turns", total=len(SHARES) * len(TRAINERS) * (rounds + 1))
        for name, share in SHARES.items():
            source = demo_source(model, share)
            contenders = [Contender(kind, source, Path(scratch) / f"{kind} {share}") for kind in TRAINERS]
            seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in TRAINERS}
            for turn in range(rounds + 1):
                for contender in contenders if turn % 2 else reversed(contenders):
                    laps = contender.step(), contender.once()
                    # The first turn warms up, and in ours holds the reference pass.
                    seconds[contender.kind] += [laps] if turn else []
                    bar.advance(task)
            found[name] = {"tokens": _lengths(source.rows), **rates(seconds)}
            del contenders
            for kind in TRAINERS:
                found[name][kind]["peak_mib"] = _peak(kind, model, share)
    Console().print(show(found))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def rates(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Of each trainer, over its turns: pairs/s of an epoch, its share of the references included, and the ratio of ours
    to it, turn by turn."""
    rates = {kind: np.array([1 / (step + once / EPOCHS) for step, once in laps]) for kind, laps in seconds.items()}
    return {
        kind: {
            "pairs_per_s": _spread(rates[kind]),
            "step_s_per_pair": _spread([step for step, _ in laps]),
            "references_s_per_pair": _spread([once for _, once in laps]),
            "ours_over_it": _spread(rates["ours"] / rates[kind]),
        }
        for kind, laps in seconds.items()
    }


def _spread(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Median, least and most of the turns."""
    return {
        "median": round(float(np.median(values)), 4), "min": round(float(np.min(values)), 4),
        "max": round(float(np.max(values)), 4), "n": len(values),
    }  # fmt: skip


def _lengths(rows: Sequence[dict[str, list[int]]]) -> dict[str, float]:
    """Mean tokens of a pair's three parts."""
    return {
        name: round(float(np.mean([len(row[f"{name}_ids"]) for row in rows])), 1)
        for name in ("prompt", "chosen", "rejected")
    }


def _peak(kind: str, model: str, share: float) -> float:
    """MiB that a step of one trainer hold at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.align_rig", kind, model, str(share)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.split()[-1])


def show(found: dict[str, Any]) -> Table:
    """Rates, ratios and peaks of each kind of pairs and trainer."""
    table = Table("pairs", "trainer", "pairs/s", "ours over it (least to most)", "peak MiB", title="training on pairs")
    for name, figures in found.items():
        for kind in TRAINERS:
            row = figures[kind]
            ratio = row["ours_over_it"]
            table.add_row(
                name, kind, f"{row['pairs_per_s']['median']:.2f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", f"{row['peak_mib']:.0f}",
            )  # fmt: skip
    return table


if __name__ == "__main__":
    typer.run(main)
