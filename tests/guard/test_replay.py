"""Replays of traces that a real monitor decided: equal, in shadow, or skipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.detector import RequestContext
from classifiers.stats import Rate
from guard.policy import Policy
from guard.replay import Replayer, replay, skip_reason
from guard.replay_report import FirstCue, ShadowTrace, compare, first_cue
from guard.steps import Zone
from guard.traces import GuardTime, StepRecord, Trace
from guard.triggers import POOL, STOPPING
from tests.guard import kit
from tests.guard.hostile import POLICIES, TOKENS
from tests.guard.recorded import (
    BOTH,
    CALM,
    CIPHER,
    CUE,
    END,
    FREE,
    LENGTH,
    ONE,
    START,
    VICTIM,
    ContextDetector,
    Seeing,
    differences,
    live,
    reader,
    runtime,
)


def wrote(start: int, end: int, score: float, *, cue: bool = False, zone: Zone = "reasoning") -> StepRecord:
    return StepRecord(start=start, end=end, zone=zone, score=score, cue=cue)


EXACT = {
    "no cue": (CALM + CALM, ONE, "reasoning", None, []),
    "nothing at all": ([], ONE, "reasoning", None, []),
    "one intervention": (CALM + CUE + CALM, ONE, "reasoning", None, [LENGTH]),
    "two interventions": (CUE + CALM + CUE + CALM, FREE, "reasoning", None, None),
    "cue at the last token": (CUE, ONE, "reasoning", len(CUE), [0]),
    "ended inside the trigger": (CALM + CUE, ONE, "reasoning", len(CALM + CUE) + 3, [3]),
    "ended with the trigger": (CALM + CUE, ONE, "reasoning", len(CALM + CUE) + LENGTH, [LENGTH]),
    "closed by the delimiter": ([*CUE[:-1], END, *CALM], ONE, "reasoning", None, [len(VICTIM.opening)]),
    "closed, ended inside": ([*CUE[:-1], END], ONE, "reasoning", len(CUE) + 2, [2]),
    "cue in the answer": ([*CALM, END, *CUE, *CALM], BOTH, "reasoning", None, [LENGTH]),
    "starts in the answer": ([*CUE, START, *CUE, END], ONE, "answer", None, [LENGTH]),
    "starts in a watched answer": (CUE + CALM, BOTH, "answer", None, [LENGTH]),
    "shadow policy": (CUE + CALM, ONE.model_copy(update={"shadow": True}), "reasoning", None, []),
    "unreadable": (CIPHER + CALM, ONE, "reasoning", None, [LENGTH]),
    "unfinished step": (CALM + CUE[:-1], ONE, "reasoning", None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_recorded_trace_replays_equal(name: str) -> None:
    model, policy, zone, limit, forced = EXACT[name]
    trace = live(model, policy, zone=zone, limit=limit)  # type: ignore[arg-type]
    found = [item.forced for item in trace.receipt.interventions]
    if forced is None:
        texts = {t.id: t for t in kit.runtime(policy).triggers}
        forced = [len(texts[item.trigger_id].spaced) for item in trace.receipt.interventions]
        assert len(forced) == 2
    assert found == forced
    assert differences(trace, policy) == []
    report = replay([trace], kit.runtime(policy), reader())
    assert (report.exact.traces, report.exact.differing, report.exact.differences) == (1, [], 0)
    assert (report.shadow.traces, report.skipped, report.sweep) == ([], {}, [])
    assert (report.policy_hash, report.detector, report.threshold) == (policy.hash, "words-1", 0.5)


def test_the_guards_time_is_nothing_that_a_replay_gives_again() -> None:
    trace = live(CALM + CUE + CALM).model_copy(update={"guard_time": GuardTime(request=9, steps=[1, 2, 3])})
    assert differences(trace) == []
    assert replay([trace], kit.runtime(ONE), reader()).exact.differing == []


def test_what_replay_decides_does_not_come_from_the_record() -> None:
    trace = live(CALM + CUE + CALM)
    bare = trace.model_copy(update={"steps": []})
    watcher = Replayer(kit.runtime(ONE), reader()).exact(bare)
    assert watcher.steps == trace.steps != []
    assert watcher.receipt == trace.receipt.model_copy(update={"engine": "replay"})


@settings(max_examples=150, deadline=None)
@given(
    TOKENS, POLICIES, st.sampled_from(["reasoning", "answer"]), st.sampled_from([0.1, 0.5, 0.9]),
    st.one_of(st.none(), st.integers(0, 200)), st.sampled_from(["car", "bread"]),
)  # fmt: skip
def test_any_tokens_replay_equal(
    model: list[int], policy: Policy, zone: Zone, threshold: float, limit: int | None, request: str
) -> None:
    policy = policy.model_copy(update={"threshold": threshold})
    run = runtime(policy)
    trace = live(model, policy, zone=zone, limit=limit, run=run, request=request)
    read = Trace.model_validate_json(trace.model_dump_json())
    assert skip_reason(read, run) is None
    replayer = Replayer(run, reader())
    assert compare(read, replayer.exact(read)) == []
    # In shadow the same settings see the same steps after the same ones before, though nothing is forced.
    assert replayer.shadow(read).steps == [step for step in read.steps if not step.injected]


@pytest.mark.parametrize("trigger", POOL, ids=lambda t: t.id)
@pytest.mark.parametrize("closed", [False, True])
def test_a_passed_over_trigger_reads_as_its_text(trigger: Any, closed: bool) -> None:
    policy = BOTH.model_copy(update={"triggers": (trigger.id,)})
    trace = live([*CUE[:-1], END, *CALM] if closed else CUE + CALM, policy)
    seeing = Seeing()
    Replayer(dataclasses.replace(kit.runtime(policy), detector=seeing), reader()).shadow(trace)
    assert seeing.seen == ["", trigger.text]


def test_another_threshold_flags_later_or_not_at_all() -> None:
    traces = [live(CALM + CUE + CALM, guard_id="cue"), live(CALM, guard_id="calm")]
    strict = replay(traces, kit.runtime(ONE.model_copy(update={"threshold": 0.1})), reader()).shadow
    first = FirstCue(step=1, token=15)
    assert strict.traces == [
        ShadowTrace(guard_id="cue", request="car", recorded=first, now=FirstCue(step=0, token=7)),
        ShadowTrace(guard_id="calm", request="car", recorded=None, now=FirstCue(step=0, token=7)),
    ]
    one, two, none = Rate.of(1, 2), Rate.of(2, 2), Rate.of(0, 2)
    assert (strict.now, strict.recorded, strict.both) == (two, one, one)
    assert (strict.only_now, strict.only_recorded) == (one, none)
    lax = replay(traces, kit.runtime(ONE.model_copy(update={"threshold": 0.9})), reader()).shadow
    assert [(t.recorded, t.now) for t in lax.traces] == [(first, None), (None, None)]
    assert (lax.now, lax.recorded, lax.both, lax.only_now, lax.only_recorded) == (none, one, none, none, one)


def test_shadow_forces_nothing_and_leaves_the_triggers_out() -> None:
    trace = live(CALM + CUE + CALM)
    watcher = Replayer(kit.runtime(ONE.model_copy(update={"threshold": 0.1})), reader()).shadow(trace)
    end = 15 + LENGTH
    assert watcher.steps == [
        wrote(0, 7, 0.125, cue=True), wrote(7, 15, 0.875, cue=True), wrote(end, end + 7, 0.125, cue=True)
    ]  # fmt: skip
    assert (watcher.receipt.shadow, watcher.receipt.interventions, watcher.receipt.errors) == (True, [], [])
    assert first_cue(trace.steps[2:]) is None


def test_a_step_under_way_ends_where_a_recorded_trigger_came() -> None:
    trace = live(CUE + CALM + CALM)
    watcher = Replayer(kit.runtime(ONE.model_copy(update={"min_step_chars": 60})), reader()).shadow(trace)
    end = 8 + LENGTH
    assert watcher.steps == [wrote(0, 8, 0.875, cue=True), wrote(end, end + 14, 0.125)]


def test_a_refusal_that_closed_the_reasoning_leaves_it_in_shadow_too() -> None:
    policy = Policy(threshold=0.5, ladder=("refuse",))
    trace = live([*CUE, *CUE, START, *CALM], policy)
    end = trace.steps[1].end
    assert [trace.output_ids[i] for i in (end - 1, end)] == [2, CUE[0]]
    assert END in trace.output_ids[8:end]
    # The second cue stands in the answer, which this policy does not watch.
    want = [wrote(0, 8, 0.875, cue=True), wrote(end + 9, end + 16, 0.125)]
    live_again, in_shadow = Seeing(), Seeing()
    run = dataclasses.replace(kit.runtime(ONE), detector=in_shadow)
    assert Replayer(run, reader()).shadow(trace).steps == want
    run = dataclasses.replace(kit.runtime(policy), detector=live_again)
    assert compare(trace, Replayer(run, reader()).exact(trace)) == []
    assert live_again.seen == in_shadow.seen == ["", STOPPING]


def test_shadow_of_another_zone() -> None:
    trace = live([*CALM, END, *CUE, *CALM], BOTH)
    report = replay([trace], kit.runtime(ONE), reader()).shadow
    assert [(t.recorded, t.now) for t in report.traces] == [(FirstCue(step=1, token=16), None)]
    trace = live([*CALM, END, *CUE, *CALM], ONE)
    watcher = Replayer(kit.runtime(BOTH), reader()).shadow(trace)
    assert watcher.steps == [
        wrote(0, 7, 0.125), wrote(8, 16, 0.875, cue=True, zone="answer"), wrote(16, 23, 0.125, zone="answer")
    ]  # fmt: skip


def test_another_detector_alone_is_shadow() -> None:
    trace = live(CUE + CALM)
    other = ContextDetector()
    other.version = "words-2"
    report = replay([trace], dataclasses.replace(kit.runtime(ONE), detector=other), reader())
    assert (report.exact.traces, len(report.shadow.traces), report.detector) == (0, 1, "words-2")


def test_damaged_spans_end_the_shadow_replay_all_the_same() -> None:
    trace = live(CALM + CALM)
    spans = [(2, 2), (3, 1), (5, 10**6), (6, 7)]
    trace.steps += [
        StepRecord(start=a, end=b, zone="reasoning", score=None, cue=False, injected=True) for a, b in spans
    ]
    watcher = Replayer(kit.runtime(BOTH), reader()).shadow(trace)
    assert [(s.start, s.end) for s in watcher.steps] == [(0, 5)]


def test_traces_that_tokens_alone_cannot_explain_are_skipped_by_reason() -> None:
    traces = [live(CALM, guard_id=f"g{i}") for i in range(7)]
    traces[1].receipt.policy = "probe"
    traces[2].tokenizer_hash = "0" * 12
    traces[3].receipt.errors = ["observe: x"]
    traces[4].receipt.unscored = 1
    traces[5].receipt.enforcement_failed = 1
    traces[6].receipt.errors = ["detector: x"]
    ticks: list[int] = []
    report = replay(traces, kit.runtime(ONE), reader(), tick=lambda: ticks.append(1))
    assert report.skipped == {
        "probe": 1, "another tokenizer": 1, "errors": 2, "unscored steps": 1, "enforcement failed": 1
    }  # fmt: skip
    assert (report.exact.traces, report.shadow.traces, len(ticks)) == (1, [], 7)


def test_a_request_is_read_once_by_the_detector() -> None:
    asked: list[str] = []

    class Asked(kit.WordDetector):
        def request(self, *messages: str) -> RequestContext:
            asked.extend(messages)
            return super().request(*messages)

    traces = [live(CALM + CUE, request=request) for request in ("car", "bread", "car")]
    replay(traces, dataclasses.replace(kit.runtime(ONE), detector=Asked()), reader())
    assert asked == ["car", "bread"]
