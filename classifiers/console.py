"""What the detector's commands show on a terminal: tables of figures, and how far a long work is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from classifiers.artifact import Manifest
    from classifiers.compare import Difference
    from classifiers.evaluate import Evaluation
    from classifiers.stats import Rate


def print_manifest(manifest: Manifest) -> None:
    """Print what a new artifact is worth."""
    print_rates(f"{manifest.version}, threshold {manifest.threshold:g}", manifest.metrics)


def print_rates(title: str, rates: dict[str, Rate]) -> None:
    """Print figures with their intervals."""
    table = Table("figure", "value [95 % interval]", "n", title=title)
    for name, rate in rates.items():
        table.add_row(name.replace("_", " "), f"{rate.rate:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]", str(rate.n))
    Console().print(table)


def print_evaluation(found: Evaluation) -> None:
    """Print every view of an evaluation, and what could not be measured."""
    print_rates(
        f"per request: {found.detector}, {found.traces} traces of the test part, threshold {found.threshold:g}",
        found.per_request,
    )
    print_rates("per step", found.per_step)
    for zone, part in found.per_zone.items():
        if part:
            print_rates(f"zone: {zone}", part)
    for name, part in found.slices.items():
        print_rates(name, part)
    print_rates("tiers, traces with text", found.tiers)
    for name, part in found.attacks.items():
        print_rates(f"attack: {name}", part)
    for note in found.notes:
        Console().print(note, highlight=False)


def print_differences(first: Path, second: Path, differences: list[Difference]) -> None:
    """Print both detectors' figures and the change."""
    table = Table("figure", str(first), str(second), "change [95 % interval]", "verdict", title="Frozen test part")
    for each in differences:
        change = f"{each.change.rate:+.3f} [{each.change.lo:+.3f}, {each.change.hi:+.3f}]"
        table.add_row(each.name.replace("_", " "), f"{each.first:.3f}", f"{each.second:.3f}", change, each.verdict)
    Console().print(table)


@contextmanager
def progress(what: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, str], None]]]:
    """A progress bar: `say(step)` names what goes on, `tick(done, total, step)` also how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield (
            lambda step: bar.update(task, description=f"{what}: {step}", total=None),
            lambda done, total, step: bar.update(task, description=f"{what}: {step}", completed=done, total=total),
        )
