"""What a replay found: where an exact one differs from the record, what a shadow one flags, what thresholds would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, JsonValue

from classifiers.stats import Rate, bootstrap
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.traces import StepRecord, Trace

TOLERANCE = 1e-6
"""Scores closer than this are the same."""
SHOWN = 10
"""A report holds at most so many differences and counts the rest."""
_ELSEWHERE = {"engine", "interventions"}
"""Fields of a receipt that `compare` leaves out: the engine is another, interventions have their own lines."""
_Record = StepRecord | BaseModel
_Unequal = tuple[str, JsonValue, JsonValue]


class Difference(BaseModel):
    """A field that the exact replay of a trace gave another value."""

    guard_id: str
    field: str
    """Such as `steps[3].score`; `steps` alone is how many there are."""
    recorded: JsonValue
    now: JsonValue


class FirstCue(BaseModel):
    """Where a trace was flagged."""

    step: int
    """Index among the steps that the model wrote (triggers do not count)."""
    token: int
    """Output index at which the step had ended, so that a trigger could have come."""


class ShadowTrace(BaseModel):
    """One trace's first cue, as recorded and as the policy and the detector at hand see it; None: not flagged."""

    guard_id: str
    request: str
    recorded: FirstCue | None
    now: FirstCue | None


class ExactReport(BaseModel):
    """How the traces fared that must come out as they were recorded."""

    traces: int = 0
    differing: list[str] = []
    """Guard ids."""
    differences: int = 0
    first: list[Difference] = []
    """The first `SHOWN`."""

    def add(self, trace: Trace, watcher: StepMonitor) -> None:
        """Counts one trace and the finished monitor that replayed it."""
        found = compare(trace, watcher)
        self.traces += 1
        self.differences += len(found)
        self.first += found[: SHOWN - len(self.first)]
        if found:
            self.differing.append(trace.guard_id)


class ShadowReport(BaseModel):
    """What another policy or detector flags; the rates are shares of the requests replayed in shadow."""

    traces: list[ShadowTrace]
    now: Rate
    recorded: Rate
    both: Rate
    only_now: Rate
    only_recorded: Rate

    @classmethod
    def of(cls, traces: list[ShadowTrace]) -> ShadowReport:
        """The shares of these traces."""
        flags = [(trace.recorded is not None, trace.now is not None) for trace in traces]
        both, recorded, now = (flags.count(pair) for pair in ((True, True), (True, False), (False, True)))
        n = len(traces)
        return cls(
            traces=traces, now=Rate.of(both + now, n), recorded=Rate.of(both + recorded, n), both=Rate.of(both, n),
            only_now=Rate.of(now, n), only_recorded=Rate.of(recorded, n),
        )  # fmt: skip


class SweepRow(BaseModel):
    """What one threshold flags in all the replayed traces."""

    threshold: float
    flagged: Rate
    """Share of requests with a cue."""
    token: Rate | None
    """Median output index at which the first cue had ended; n is the flagged requests, None without any."""
    per_1000: Rate | None
    """Cues per 1,000 steps; n is the requests that the interval resamples, None without a step."""

    @classmethod
    def of(cls, runs: list[list[StepRecord]], threshold: float, policy: Policy) -> SweepRow:
        """What a threshold flags in runs of scored steps, one run a request."""
        marks = [
            [policy.is_cue(step.score, threshold=threshold, unreadable=step.unreadable) for step in run] for run in runs
        ]
        tokens = [run[row.index(True)].end for run, row in zip(runs, marks, strict=True) if True in row]
        counts = [len(row) for row in marks]
        token = bootstrap(lambda t: float(np.median(t)), tokens) if tokens else None
        per_1000 = bootstrap(_per_1000, [sum(row) for row in marks], counts) if sum(counts) else None
        return cls(threshold=threshold, flagged=Rate.of(len(tokens), len(runs)), token=token, per_1000=per_1000)


class ReplayReport(BaseModel):
    """A whole replay."""

    policy: str
    policy_hash: str
    detector: str
    threshold: float
    skipped: dict[str, int]
    """Traces that were not replayed, by reason."""
    exact: ExactReport
    shadow: ShadowReport
    sweep: list[SweepRow]


def compare(trace: Trace, watcher: StepMonitor) -> list[Difference]:
    """Every field in which a finished exact replay differs from the record: steps, interventions, receipt.

    Scores within `TOLERANCE` are equal; the receipt's `engine` is not compared.
    """
    recorded, now = trace.receipt, watcher.receipt
    found = [
        *_listed("steps", trace.steps, watcher.steps),
        *_listed("interventions", recorded.interventions, now.interventions),
        *_unequal("receipt", recorded, now),
    ]
    return [Difference(guard_id=trace.guard_id, field=name, recorded=a, now=b) for name, a, b in found]


def replaced_cues(trace: Trace) -> dict[int, list[int]]:
    """Ids that a trigger replaced (mode `substitute`), by the output index at which it stands."""
    return {each.at: each.cue_ids for each in trace.receipt.interventions if each.cue_ids}


def recorded_cue(trace: Trace) -> FirstCue | None:
    """The first cue that the live guard saw, whether it stands in the output or was replaced."""
    kept = first_cue(trace.steps)
    at = min(replaced_cues(trace), default=None)
    if at is None or (kept is not None and kept.token <= at):
        return kept
    before = sum(step.end <= at for step in written(trace.steps))
    return FirstCue(step=before, token=at + len(replaced_cues(trace)[at]))


def first_cue(steps: Iterable[StepRecord]) -> FirstCue | None:
    """The first cue among the steps that the model wrote."""
    return next((FirstCue(step=i, token=s.end) for i, s in enumerate(written(steps)) if s.cue), None)


def written(steps: Iterable[StepRecord]) -> list[StepRecord]:
    """The steps that the model wrote: triggers left out."""
    return [step for step in steps if not step.injected]


def _listed(name: str, recorded: Sequence[_Record], now: Sequence[_Record]) -> Iterator[_Unequal]:
    for index, (left, right) in enumerate(zip(recorded, now, strict=False)):
        yield from _unequal(f"{name}[{index}]", left, right)
    if len(recorded) != len(now):
        yield name, len(recorded), len(now)


def _unequal(name: str, recorded: _Record, now: _Record) -> Iterator[_Unequal]:
    after = _fields(now)
    for field, value in _fields(recorded).items():
        if not _same(value, after[field]):
            yield f"{name}.{field}", value, after[field]


def _fields(record: _Record) -> dict[str, Any]:
    return dataclasses.asdict(record) if isinstance(record, StepRecord) else record.model_dump(exclude=_ELSEWHERE)


def _same(recorded: object, now: object) -> bool:
    if isinstance(recorded, float) and isinstance(now, float):
        return abs(recorded - now) <= TOLERANCE
    return recorded == now


def _per_1000(cues: npt.NDArray[np.integer], steps: npt.NDArray[np.integer]) -> float:
    return 1000 * int(cues.sum()) / int(steps.sum()) if steps.any() else float("nan")
