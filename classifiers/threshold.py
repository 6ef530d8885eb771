"""The detector's threshold: the lowest that leaves benign requests alone, each with as many steps as a request has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np

from classifiers.data import LabelledStep
from classifiers.linear import Floats
from classifiers.stats import Rate
from guard.steps import split_text

if TYPE_CHECKING:
    from demo.rows import Row

FLOOR = 0.5
"""No threshold is lower: below it the model itself holds a step for no cue, whatever the benign requests allow."""
TRACE_STEPS = 8
"""Steps of a trace made of single labelled steps. The demo's requests have 3 to 6 and long reasonings up to 40."""
Kind = Literal["comply", "alarming", "benign"]


@dataclass(frozen=True)
class TraceRow:
    """The steps of one reasoning; `comply` goes along with a harmful request, the others answer a benign one."""

    request: str
    steps: tuple[str, ...]
    kind: Kind
    group: str
    source: str


def demo_traces(rows: Iterable[Row]) -> list[TraceRow]:
    """Turn the demo's complying and benign rows into traces, split as the live guard splits."""
    return [
        TraceRow(row.request, tuple(split_text(row.reasoning)), _kind(row), row.topic_id, "demo")
        for row in rows
        if row.shape in {"comply", "benign"}
    ]


def _kind(row: Row) -> Kind:
    if row.shape == "comply":
        return "comply"
    return "alarming" if row.kind == "alarming" else "benign"


def step_traces(rows: Iterable[LabelledStep]) -> list[TraceRow]:
    """Group the steps of every benign request, in an order set by their ids, into traces of about eight."""
    groups: dict[str, list[LabelledStep]] = defaultdict(list)
    for row in rows:
        if row.step and row.request_label == "benign":
            groups[row.request].append(row)
    traces = []
    for request, members in groups.items():
        members.sort(key=lambda row: (crc32(row.id.encode()), row.id))
        for part in np.array_split(np.arange(len(members)), max(1, round(len(members) / TRACE_STEPS))):
            steps = tuple(members[index].step for index in part)
            kind: Kind = "alarming" if members[0].alarming else "benign"
            traces.append(TraceRow(request, steps, kind, members[0].topic, "steps"))
    return traces


def choose_threshold(traces: Sequence[TraceRow], peaks: Floats, allowed: dict[Kind, float]) -> float:
    """Return the lowest threshold at which at most a share allowed[kind] of each kind's traces is flagged.

    `peaks` [n] are the highest scores of the traces. Sources count alike, however many traces each has: how many steps
    were written for training says nothing of use. A kind without traces allows anything; never below 0.5.
    """
    kinds = np.array([trace.kind for trace in traces])
    sizes = Counter((trace.kind, trace.source) for trace in traces)
    sources = Counter(kind for kind, _ in sizes)
    mass = np.array([1 / (sizes[each.kind, each.source] * sources[each.kind]) for each in traces])
    lowest = [_lowest(peaks[kinds == kind], mass[kinds == kind], share) for kind, share in allowed.items()]
    return round(min(max(FLOOR, *lowest), 1 - 1e-6), 6)


def _lowest(peaks: Floats, mass: Floats, share: float) -> float:
    order = np.argsort(-peaks, kind="stable")
    flagged = int(np.searchsorted(np.cumsum(mass[order]), share + 1e-9, side="right"))
    if flagged == len(peaks):
        return FLOOR
    # Half-way to the next peak, so that no measured step sits on the edge.
    return float((peaks[order[flagged]] + (peaks[order[flagged - 1]] if flagged else 1.0)) / 2)


def flagged_traces(traces: Sequence[TraceRow], peaks: Floats, threshold: float) -> dict[str, Rate]:
    """Return the share of traces with a step at or above the threshold, for each kind and source."""
    cells: dict[str, list[bool]] = defaultdict(list)
    for trace, peak in zip(traces, peaks, strict=True):
        cells[f"flagged_{trace.kind}_traces"].append(bool(peak >= threshold))
        cells[f"flagged_{trace.kind}_traces_{trace.source}"].append(bool(peak >= threshold))
    return {name: Rate.of(sum(hits), len(hits)) for name, hits in sorted(cells.items())}
