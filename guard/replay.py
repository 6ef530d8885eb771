"""Re-decides recorded traces: exactly as the live guard did, or as another policy or detector would have.

A trace whose receipt names the policy and the detector at hand is replayed *exactly*: a real `StepMonitor` reads the
recorded ids, and everything it decides must equal what was recorded. Any other trace is replayed in *shadow*: the
recorded tokens are what happened, so nothing is forced, the recorded triggers are passed over, and every other step
is scored.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, JsonValue

from classifiers.detector import RequestContext
from classifiers.stats import Rate, bootstrap
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.traces import StepRecord, Trace

TOLERANCE = 1e-6
"""Scores closer than this are the same."""
SHOWN = 10
"""A report holds at most so many differences and counts the rest."""
PROBE = "probe"
"""Name of the policy that proofs of life run under: the engine sets their first score itself."""
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


class ShadowReport(BaseModel):
    """What another policy or detector flags; the rates are shares of the requests replayed in shadow."""

    traces: list[ShadowTrace]
    now: Rate
    recorded: Rate
    both: Rate
    only_now: Rate
    only_recorded: Rate


class SweepRow(BaseModel):
    """What one threshold flags in all the replayed traces."""

    threshold: float
    flagged: Rate
    """Share of requests with a cue."""
    token: Rate | None
    """Median output index at which the first cue had ended; n is the flagged requests, None without any."""
    per_1000: Rate | None
    """Cues per 1,000 steps; n is the requests that the interval resamples, None without a step."""


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


class Replayer:
    """Drives monitors over traces with one detector; keeps one request context per request text."""

    def __init__(self, runtime: GuardRuntime, reader: PromptReader) -> None:
        self._runtime, self._reader = runtime, reader
        self._shadow = dataclasses.replace(runtime, policy=runtime.policy.model_copy(update={"shadow": True}))
        self._delimiters = {runtime.delimiters.start, runtime.delimiters.end}
        self._contexts: dict[str, RequestContext] = {}

    def exact(self, trace: Trace) -> StepMonitor:
        """The finished monitor that decided the recorded ids again, as the engine drives it."""
        watcher = self._open(self._runtime, trace)
        for token in trace.output_ids:
            watcher.observe(token)
            self._decide(watcher)
        return self._finish(watcher)

    def shadow(self, trace: Trace) -> StepMonitor:
        """The finished monitor that scored what the model wrote; its steps leave the recorded triggers out."""
        watcher, ids = self._open(self._shadow, trace), trace.output_ids
        triggers = {step.start: step.end for step in trace.steps if step.injected}
        index = 0
        while index < len(ids):
            end = triggers.get(index, index)
            if end > index:
                self._pass_over(watcher, ids[index:end])
                index = end
            else:
                watcher.observe(ids[index])
                self._decide(watcher)
                index += 1
        return self._finish(watcher)

    def _pass_over(self, watcher: StepMonitor, forced: list[int]) -> None:
        """Leaves out what was forced, as `previous` its text up to a delimiter, which changes the zone as ever."""
        # Another policy's limits may have a step under way here: it ends where the trigger came.
        self._finish(watcher)
        text = self._runtime.table.text(list(takewhile(lambda token: token not in self._delimiters, forced))).strip()
        for token in forced:
            if token in self._delimiters:
                watcher.observe(token)
            else:
                watcher.pass_over(1, text)

    def _open(self, runtime: GuardRuntime, trace: Trace) -> StepMonitor:
        zone = self._reader.zone(trace.prompt_ids)
        return StepMonitor(runtime, trace.request, zone=zone, guard_id=trace.guard_id)

    def _decide(self, watcher: StepMonitor) -> None:
        if (step := watcher.pending) is None:
            return
        detector, request = self._runtime.detector, watcher.request
        if request not in self._contexts:
            self._contexts[request] = detector.request(request)
        watcher.decide(float(detector.score(self._contexts[request], [step.text], watcher.previous)[0]))

    def _finish(self, watcher: StepMonitor) -> StepMonitor:
        watcher.finish()
        self._decide(watcher)
        return watcher


def replay(
    traces: Iterable[Trace], runtime: GuardRuntime, reader: PromptReader, thresholds: Sequence[float] = (),
    tick: Callable[[], object] = lambda: None,
) -> ReplayReport:  # fmt: skip
    """Replays traces, each exactly where its receipt names this policy and detector, else in shadow.

    `thresholds` within 0 and 1 get a row of the sweep each. `tick` is called after every trace.
    """
    replayer, skipped = Replayer(runtime, reader), Counter[str]()
    exact, shadow, runs = ExactReport(), list[ShadowTrace](), list[list[StepRecord]]()
    for trace in traces:
        reason = skip_reason(trace, runtime)
        if reason is not None:
            skipped[reason] += 1
        elif is_exact(trace, runtime):
            watcher = replayer.exact(trace)
            _add(exact, trace, watcher)
            runs.append(_written(watcher.steps))
        else:
            steps = replayer.shadow(trace).steps
            before, now = first_cue(trace.steps), first_cue(steps)
            shadow.append(ShadowTrace(guard_id=trace.guard_id, request=trace.request, recorded=before, now=now))
            runs.append(steps)
        tick()
    policy = runtime.policy
    return ReplayReport(
        policy=policy.name, policy_hash=policy.hash, detector=runtime.detector.version, threshold=runtime.threshold,
        skipped=dict(skipped), exact=exact, shadow=_summed(shadow),
        sweep=[_sweep(runs, threshold, policy) for threshold in thresholds],
    )  # fmt: skip


def skip_reason(trace: Trace, runtime: GuardRuntime) -> str | None:
    """Why a trace cannot be decided again from its tokens alone; None when it can."""
    receipt = trace.receipt
    if receipt.policy == PROBE:
        return "probe"
    if trace.log_content == "none":
        return "no token ids kept"
    if trace.tokenizer_hash != runtime.tokenizer_hash:
        return "another tokenizer"
    if receipt.enforcement_failed:
        return "enforcement failed"
    if receipt.unscored:
        return "unscored steps"
    return "errors" if receipt.errors else None


def is_exact(trace: Trace, runtime: GuardRuntime) -> bool:
    """Whether the trace was recorded under the runtime's policy and detector, so that its replay must be equal."""
    return (trace.receipt.policy_hash, trace.receipt.detector) == (runtime.policy.hash, runtime.detector.version)


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


def first_cue(steps: Iterable[StepRecord]) -> FirstCue | None:
    """The first cue among the steps that the model wrote."""
    return next((FirstCue(step=i, token=s.end) for i, s in enumerate(_written(steps)) if s.cue), None)


def _written(steps: Iterable[StepRecord]) -> list[StepRecord]:
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


def _add(report: ExactReport, trace: Trace, watcher: StepMonitor) -> None:
    found = compare(trace, watcher)
    report.traces += 1
    report.differences += len(found)
    report.first += found[: SHOWN - len(report.first)]
    if found:
        report.differing.append(trace.guard_id)


def _summed(traces: list[ShadowTrace]) -> ShadowReport:
    flags = [(trace.recorded is not None, trace.now is not None) for trace in traces]
    both, recorded, now = (flags.count(pair) for pair in ((True, True), (True, False), (False, True)))
    n = len(traces)
    return ShadowReport(
        traces=traces, now=Rate.of(both + now, n), recorded=Rate.of(both + recorded, n), both=Rate.of(both, n),
        only_now=Rate.of(now, n), only_recorded=Rate.of(recorded, n),
    )  # fmt: skip


def _sweep(runs: list[list[StepRecord]], threshold: float, policy: Policy) -> SweepRow:
    marks = [[_is_cue(step, threshold, policy) for step in steps] for steps in runs]
    tokens = [steps[row.index(True)].end for steps, row in zip(runs, marks, strict=True) if True in row]
    counts = [len(row) for row in marks]
    token = bootstrap(lambda t: float(np.median(t)), tokens) if tokens else None
    per_1000 = bootstrap(_per_1000, [sum(row) for row in marks], counts) if sum(counts) else None
    return SweepRow(threshold=threshold, flagged=Rate.of(len(tokens), len(runs)), token=token, per_1000=per_1000)


def _is_cue(step: StepRecord, threshold: float, policy: Policy) -> bool:
    """What `StepMonitor.decide` would say at another threshold."""
    scored = policy.fail_mode == "closed" if step.score is None else step.score >= threshold
    return scored or (step.unreadable and policy.unreadable == "cue")


def _per_1000(cues: npt.NDArray[np.integer], steps: npt.NDArray[np.integer]) -> float:
    return 1000 * int(cues.sum()) / int(steps.sum()) if steps.any() else float("nan")
