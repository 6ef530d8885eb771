"""What was in force when, what the gates said, and how often the guard had to intervene before and after."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from align.figures import show
from align.versions import Event, history, verdict_of
from classifiers.stats import Rate
from guard.cli import harmless
from guard.errors import UserError
from guard.traces import Trace, read_traces
from guard.weights import BASE, Registry


class Line(BaseModel):
    """One event, and the share of requests with an intervention per 1,000 in the periods before and after it."""

    model_config = ConfigDict(extra="forbid")

    event: Event
    gate: str
    """Criteria that were met, of how many."""
    interventions_before: Rate | None
    interventions_after: Rate | None
    """None for an event that changed nothing."""


class Status(BaseModel):
    """What `align status --json` prints."""

    model_config = ConfigDict(extra="forbid")

    current: int
    versions: list[int]
    lines: list[Line]
    interventions: dict[int, Rate]
    """Per 1,000 requests, by the version that answered, over all its periods."""
    left_out: dict[str, int]
    """Traces that count for no version, by reason."""


def status(registry: Registry, traces: Path | None) -> Status:
    """Reads the registry, and the traces where a directory is given."""
    events = history(registry)
    changes = [event for event in events if event.version is not None]
    periods, left_out = _periods(registry, changes, read_traces(traces)[0] if traces is not None else [])
    made = registry.versions()
    by_version = {
        version: per_1000(flags)
        for version in (BASE, *made)
        if (flags := [f for i, own in periods.items() if _in_force(changes, i) == version for f in own])
    }
    lines = []
    for event in events:
        at = changes.index(event) if event.version is not None else None
        lines.append(
            Line(
                event=event, gate=gate_of(registry, event),
                interventions_before=None if at is None else per_1000(periods.get(at - 1, [])),
                interventions_after=None if at is None else per_1000(periods.get(at, [])),
            )
        )  # fmt: skip
    return Status(
        current=registry.current(), versions=made, lines=lines, interventions=by_version, left_out=left_out
    )  # fmt: skip


def per_1000(flags: Sequence[bool]) -> Rate:
    """The share of requests with an intervention, times 1,000, with Wilson's interval."""
    share = Rate.of(sum(flags), len(flags))
    return Rate(rate=1000 * share.rate, lo=1000 * share.lo, hi=1000 * share.hi, n=share.n)


def _periods(
    registry: Registry, changes: Sequence[Event], traces: Iterable[Trace]
) -> tuple[dict[int, list[bool]], dict[str, int]]:
    """Whether each trace was intervened, by the change (-1: none yet) that had put its weights in force.

    The weights tell the version; the time only tells two periods of one version apart, so that requests which ended on
    the old weights after the change count for the old ones.
    """
    version_of: dict[str, int] = {}
    for number in registry.versions():
        manifest = registry.manifest(number)
        version_of |= {manifest.base: BASE, manifest.weights: number}
    periods: dict[int, list[bool]] = {}
    left_out = {"probes and shadow mode": 0, "no weights hash": 0, "another model": 0}
    for trace in traces:
        version = version_of.get(trace.weights)
        if trace.receipt.policy == "probe" or trace.receipt.shadow:
            left_out["probes and shadow mode"] += 1
        elif version is None:
            left_out["another model" if trace.weights else "no weights hash"] += 1
        else:
            began = [i for i, e in enumerate(changes) if e.version == version and e.time <= trace.created]
            periods.setdefault(began[-1] if began else -1, []).append(bool(trace.receipt.interventions))
    return periods, left_out


def _in_force(changes: Sequence[Event], period: int) -> int:
    return BASE if period < 0 else changes[period].version or BASE


def gate_of(registry: Registry, event: Event) -> str:
    """What an event's gate said, in a few words."""
    if event.event == "rolled back":
        return ""
    if event.version is None:
        return f"refused: {'; '.join(event.reasons)}"
    try:
        verdict = verdict_of(registry, event.version)
    except UserError:
        return "gate.json is missing"
    met = sum(check.passed for check in verdict.checks) if verdict else 0
    total = len(verdict.checks) if verdict else 0
    return f"{met} of {total} met{', forced' if event.forced else ''}"


def table(found: Status) -> Table:
    """One line an event, the newest last."""
    shown = Table(title=f"Version {found.current} is in force", title_justify="left")
    for column in ("when", "what", "version", "gate", "interventions per 1,000 before", "after"):
        shown.add_column(column)
    for line in found.lines:
        event = line.event
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event.time))
        version = "" if event.version is None else f"{event.before} -> {event.version}"
        rates = (line.interventions_before, line.interventions_after)
        shown.add_row(
            when, event.event, version, harmless(line.gate),
            *(Text("" if rate is None else show(rate, "per 1,000")) for rate in rates),
        )  # fmt: skip
    return shown
