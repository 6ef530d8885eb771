"""What is counted of a finished response, label by label."""

from __future__ import annotations

from typing import Any

import pytest

from guard.policy import Policy
from guard.sidecar.metrics import Metrics
from guard.sidecar.proof import Delivered, prove
from guard.traces import GuardTime, Intervention, StepRecord, Trace
from tests.guard.sidecar.scripted import trace_of

POLICY = Policy(name="strict", zones=("reasoning", "answer"))


def counted(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values by the values of their labels; zeros left out."""
    family = next(f for f in metrics.registry.collect() if f.name == f"reasonguard_{name}")
    return {tuple(s.labels.values()): s.value for s in family.samples if s.name.endswith("_total") and s.value}


def step(zone: Any, score: float | None, **more: Any) -> StepRecord:
    return StepRecord(start=0, end=1, zone=zone, score=score, cue=more.pop("cue", False), **more)


def traced(steps: list[StepRecord], **receipt: Any) -> Trace:
    return trace_of("g1", POLICY, **receipt).model_copy(update={"steps": steps})


def test_steps_and_interventions_are_told_apart_by_zone_and_result() -> None:
    steps = [
        step("reasoning", 0.1), step("reasoning", 0.9, cue=True), step("reasoning", None, injected=True),
        step("reasoning", 0.2, unreadable=True), step("answer", 0.1), step("answer", 0.2), step("answer", None),
        step("answer", 0.8, cue=True),
    ]  # fmt: skip
    done = [
        Intervention(step=1, at=2, trigger_id="danger", score=0.9, forced=4, completed=True),
        Intervention(step=7, at=9, trigger_id="refuse", rung="refuse", score=0.8, forced=1),
    ]
    metrics = Metrics()
    trace = traced(steps, interventions=done, injected_tokens=5, seen=7, scored=6, unscored=1)
    metrics.count(prove("g1", trace, Delivered(3), POLICY))
    assert counted(metrics, "steps") == {
        ("strict", "inject", "reasoning", "clear"): 1, ("strict", "inject", "reasoning", "cue"): 1,
        ("strict", "inject", "reasoning", "unreadable"): 1, ("strict", "inject", "answer", "clear"): 2,
        ("strict", "inject", "answer", "unscored"): 1, ("strict", "inject", "answer", "cue"): 1,
    }  # fmt: skip
    assert counted(metrics, "interventions") == {
        ("strict", "inject", "reasoning", "completed"): 1, ("strict", "inject", "answer", "cut"): 1,
    }  # fmt: skip
    assert counted(metrics, "requests") == {("strict", "inject", "unproven"): 1}
    assert counted(metrics, "injected_tokens") == {("strict", "inject"): 5}


def test_the_guards_time_is_told_by_request_and_by_step() -> None:
    metrics = Metrics()
    for spent in (GuardTime(request=4_000, steps=[90, 2_000, 40_000]), None, GuardTime()):
        trace = traced([step("reasoning", 0.1)]).model_copy(update={"guard_time": spent})
        metrics.count(prove("g1", trace, Delivered(3), POLICY))
    request, by_step = (
        {s.labels.get("le") or s.name.rpartition("_")[2]: s.value for family in each.collect() for s in family.samples}
        for each in (metrics.guard_request, metrics.guard_step)
    )
    assert (request["count"], request["0.001"], request["0.025"], request["0.05"]) == (2, 1, 1, 2)
    assert (by_step["count"], by_step["0.0001"], by_step["0.0025"], by_step["0.05"]) == (3, 1, 2, 3)
    assert by_step["sum"] == pytest.approx(0.04209)


def test_a_trace_that_contradicts_itself_is_counted_all_the_same() -> None:
    done = Intervention(step=0, at=0, trigger_id="danger", score=0.9, forced=1, completed=True)
    metrics = Metrics()
    metrics.count(prove("g1", traced([step("reasoning", 0.1)], interventions=[done]), Delivered(3), POLICY))
    assert counted(metrics, "requests") == {("strict", "inject", "guarded"): 1}
    assert counted(metrics, "unanswered_cues") == {}


def test_a_replaced_cue_counts_though_it_is_no_step_any_more() -> None:
    done = Intervention(step=1, at=1, trigger_id="danger", mode="substitute", cue_ids=[5], score=0.9, completed=True)
    steps = [step("reasoning", 0.1), step("reasoning", None, injected=True)]
    metrics = Metrics()
    trace = traced(steps, interventions=[done], seen=2, scored=2)
    metrics.count(prove("g1", trace, Delivered(3), POLICY, mode="substitute"))
    assert counted(metrics, "steps") == {
        ("strict", "substitute", "reasoning", "clear"): 1, ("strict", "substitute", "reasoning", "cue"): 1,
    }  # fmt: skip
    assert counted(metrics, "requests") == {("strict", "substitute", "guarded"): 1}
    assert counted(metrics, "unanswered_cues") == {}


def test_a_request_without_a_receipt_counts_for_the_policy_in_force() -> None:
    metrics = Metrics()
    metrics.requests.in_force = lambda: POLICY
    metrics.requests.labels("refused").inc()
    metrics.count(prove("g1", None, Delivered(3), Policy()))
    assert counted(metrics, "requests") == {("strict", "inject", "refused"): 1, ("default", "inject", "unproven"): 1}
    assert counted(metrics, "steps") == {}
