"""Re-decides recorded traces: exactly as the live guard did, or as another policy or detector would have.

A trace whose receipt names the policy and the detector at hand is replayed *exactly*: a real `StepMonitor` reads the
recorded ids, and everything it decides must equal what was recorded. Any other trace is replayed in *shadow*: the
recorded tokens are what happened, so nothing is forced, the recorded triggers are passed over, and every other step
is scored.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from classifiers.detector import RequestContext
from guard.monitor import StepMonitor
from guard.prompt import PromptReader
from guard.replay_report import (
    ExactReport,
    ReplayReport,
    ShadowReport,
    ShadowTrace,
    SweepRow,
    first_cue,
    recorded_cue,
    replaced_cues,
    written,
)
from guard.runtime import GuardRuntime
from guard.traces import Mode, StepRecord, Trace

PROBE = "probe"
"""Name of the policy that proofs of life run under: the engine sets their first score itself."""


class Replayer:
    """Drives monitors over traces with one detector; keeps one request context per prompt."""

    def __init__(self, runtime: GuardRuntime, reader: PromptReader) -> None:
        self._runtime, self._reader = runtime, reader
        self._shadow = dataclasses.replace(runtime, policy=runtime.policy.model_copy(update={"shadow": True}))
        self._contexts: dict[tuple[str, ...], RequestContext] = {}
        self._messages: tuple[str, ...] = ()
        """Of the trace under way."""

    def exact(self, trace: Trace) -> StepMonitor:
        """The finished monitor that decided the recorded ids again, as the engine drives it."""
        cues = replaced_cues(trace)
        watcher = self._open(self._runtime, trace, "substitute" if cues else "inject")
        for index, token in enumerate(trace.output_ids):
            self._take_back(watcher, cues.pop(index, []))
            watcher.observe(token)
            self._decide(watcher)
        self._take_back(watcher, cues.pop(len(trace.output_ids), []))
        return self._finish(watcher)

    def _take_back(self, watcher: StepMonitor, cue: list[int]) -> None:
        """What the model had said where a trigger stands now."""
        for token in cue:
            watcher.observe(token)
            self._decide(watcher)
        if cue and watcher.forced is None:
            # No mark ended the cue: the model's end or the token limit did.
            watcher.end_step()
            self._decide(watcher)

    def shadow(self, trace: Trace) -> StepMonitor:
        """The finished monitor that scored what the model wrote; its steps leave the recorded triggers out."""
        watcher, ids = self._open(self._shadow, trace, "inject"), trace.output_ids
        cues = replaced_cues(trace)
        triggers = {step.start: step.end for step in trace.steps if step.injected}
        index = 0
        while index < len(ids):
            for token in cues.pop(index, ()):
                watcher.observe(token)
                self._decide(watcher)
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
        # Another policy's limits may have a step under way here: it ends where the trigger came.
        self._finish(watcher)
        watcher.pass_over(forced)

    def _open(self, runtime: GuardRuntime, trace: Trace, mode: Mode) -> StepMonitor:
        zones = self._reader.zones(trace.prompt_ids)
        self._messages = tuple(self._reader.messages(trace.prompt_ids))
        return StepMonitor(runtime, trace.request, zones=zones, guard_id=trace.guard_id, mode=mode)

    def _decide(self, watcher: StepMonitor) -> None:
        if (step := watcher.pending) is None:
            return
        detector, asked = self._runtime.detector, self._messages
        if asked not in self._contexts:
            self._contexts[asked] = detector.request(*asked)
        watcher.decide(float(detector.score(self._contexts[asked], [step.text], watcher.previous)[0]))

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
            exact.add(trace, watcher)
            runs.append(written(replayer.shadow(trace).steps if replaced_cues(trace) else watcher.steps))
        else:
            steps = replayer.shadow(trace).steps
            before, now = recorded_cue(trace), first_cue(steps)
            shadow.append(ShadowTrace(guard_id=trace.guard_id, request=trace.request, recorded=before, now=now))
            runs.append(steps)
        tick()
    policy = runtime.policy
    return ReplayReport(
        policy=policy.name, policy_hash=policy.hash, detector=runtime.detector.version, threshold=runtime.threshold,
        skipped=dict(skipped), exact=exact, shadow=ShadowReport.of(shadow),
        sweep=[SweepRow.of(runs, threshold, policy) for threshold in thresholds],
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
