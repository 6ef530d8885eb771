"""What a replay reports: differences by name, and what other thresholds flag."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.stats import Rate
from guard.policy import Policy
from guard.replay import replay
from guard.replay_report import Difference
from tests.guard import kit
from tests.guard.hostile import POLICIES, TOKENS
from tests.guard.recorded import (
    BOTH,
    CALM,
    CIPHER,
    CUE,
    FREE,
    LENGTH,
    ONE,
    VICTIM,
    differences,
    live,
    reader,
    runtime,
)

TAMPERED = {
    "score": ("steps", 1, {"score": 0.876}, [("steps[1].score", 0.876, 0.875)]),
    "no score": ("steps", 0, {"score": None}, [("steps[0].score", None, 0.125)]),
    "boundary": ("steps", 0, {"end": 6}, [("steps[0].end", 6, 7)]),
    "cue": ("steps", 1, {"cue": False}, [("steps[1].cue", False, True)]),
    "zone": ("steps", 3, {"zone": "answer"}, [("steps[3].zone", "answer", "reasoning")]),
    "trigger": ("interventions", 0, {"trigger_id": "danger"}, [("interventions[0].trigger_id", "danger", "victim")]),
    "at": ("interventions", 0, {"at": 14}, [("interventions[0].at", 14, 15)]),
    "forced": ("interventions", 0, {"forced": 2}, [("interventions[0].forced", 2, LENGTH)]),
    "completed": ("interventions", 0, {"completed": False}, [("interventions[0].completed", False, True)]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_field_is_named(name: str) -> None:
    where, index, change, wanted = TAMPERED[name]
    trace = live(CALM + CUE + CALM)
    records: Any = trace.steps if where == "steps" else trace.receipt.interventions
    for field, value in change.items():
        setattr(records[index], field, value)
    assert differences(trace) == [Difference(guard_id="kit", field=f, recorded=a, now=b) for f, a, b in wanted]


@pytest.mark.parametrize(("shift", "differs"), [(0.9e-6, False), (-0.9e-6, False), (2e-6, True)])
def test_scores_are_equal_to_a_millionth(shift: float, differs: bool) -> None:
    trace = live(CALM)
    trace.steps[0].score = 0.125 + shift
    assert [d.field for d in differences(trace)] == ["steps[0].score"] * differs


def test_missing_steps_interventions_and_counts_are_named() -> None:
    trace = live(CALM + CUE + CALM)
    del trace.steps[-1], trace.receipt.interventions[:]
    trace.receipt.seen = 9
    found = [(d.field, d.recorded, d.now) for d in differences(trace)]
    assert found == [("steps", 3, 4), ("interventions", 0, 1), ("receipt.seen", 9, 3)]


def test_another_token_in_place_of_a_forced_one_is_found() -> None:
    trace = live(CUE + CALM)
    trace.output_ids[len(CUE)] = CALM[0]
    said = {d.field: d.now for d in differences(trace)}
    assert said["interventions[0].forced"] == 0
    assert said["receipt.enforcement_failed"] == 1
    assert said["receipt.errors"] == [f"engine appended {CALM[0]} where {VICTIM.spaced[0]} was forced"]


def test_a_report_holds_the_first_ten_differences_and_counts_the_rest() -> None:
    traces = [live(CALM * 4, guard_id=f"g{i}") for i in range(4)]
    for trace in traces[1:]:
        for step in trace.steps:
            step.score = 0.5
    report = replay(traces, kit.runtime(ONE), reader()).exact
    assert (report.traces, report.differing, report.differences) == (4, ["g1", "g2", "g3"], 12)
    wanted = [("g1", i) for i in range(4)] + [("g2", i) for i in range(4)] + [("g3", i) for i in range(2)]
    assert [(d.guard_id, d.field) for d in report.first] == [(g, f"steps[{i}].score") for g, i in wanted]


def test_the_sweep_by_hand() -> None:
    traces = [
        live(CALM + CUE + CALM, guard_id="a"),  # 3 steps, the cue ends at 15
        live(CUE + CALM, guard_id="b"),  # 2 steps, the cue ends at 8
        live(CALM + CALM, guard_id="c"),  # 2 steps
        live(CALM, guard_id="d"),  # 1 step
    ]
    rows = replay(traces, kit.runtime(ONE), reader(), [0.1, 0.125, 0.5, 0.9]).sweep
    assert [row.threshold for row in rows] == [0.1, 0.125, 0.5, 0.9]
    assert [row.flagged for row in rows] == [Rate.of(4, 4), Rate.of(4, 4), Rate.of(2, 4), Rate.of(0, 4)]
    # The first cues end at 7, 8, 7, 7 under 0.1, and at 15 and 8 under 0.5.
    assert [row.token and (row.token.rate, row.token.n) for row in rows] == [(7, 4), (7, 4), (11.5, 2), None]
    assert [row.per_1000 and (row.per_1000.rate, row.per_1000.n) for row in rows] == [
        (1000, 4), (1000, 4), (250, 4), (0, 4)
    ]  # fmt: skip
    token, steps = rows[2].token, rows[2].per_1000
    assert token is not None
    assert (token.lo, token.hi) == (8, 15)
    assert steps is not None
    assert 0 == steps.lo < 250 < steps.hi <= 500


def test_the_sweep_counts_exact_and_shadow_traces_alike() -> None:
    traces = [live(CALM + CUE + CALM), live(CALM + CUE + CALM, BOTH)]
    report = replay(traces, kit.runtime(ONE), reader(), [0.5])
    assert (report.exact.traces, len(report.shadow.traces)) == (1, 1)
    assert report.sweep[0].per_1000 is not None
    assert (report.sweep[0].flagged, report.sweep[0].per_1000.rate) == (Rate.of(2, 2), pytest.approx(1000 / 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=4), POLICIES)
def test_the_sweep_at_the_policys_threshold_flags_what_its_replay_flags(
    models: list[list[int]], policy: Policy
) -> None:
    run = runtime(policy.model_copy(update={"version": 2}))
    traces = [live(model, run=runtime(FREE)) for model in models]
    report = replay(traces, run, reader(), [run.threshold])
    assert report.sweep[0].flagged == report.shadow.now
    assert report.shadow.now.n == len(models)


@pytest.mark.parametrize(("unreadable", "flagged"), [("cue", 1), ("flag", 0)])
def test_an_unreadable_step_is_flagged_at_any_threshold_if_the_policy_says_so(unreadable: str, flagged: int) -> None:
    policy = ONE.model_copy(update={"unreadable": unreadable})
    (row,) = replay([live(CIPHER)], kit.runtime(policy), reader(), [1.0]).sweep
    assert row.flagged == Rate.of(flagged, 1)


def test_no_traces_and_no_steps_have_no_figures() -> None:
    (row,) = replay([], kit.runtime(ONE), reader(), [0.5]).sweep
    assert (row.flagged, row.token, row.per_1000) == (Rate.of(0, 0), None, None)
    (row,) = replay([live([])], kit.runtime(ONE), reader(), [0.5]).sweep
    assert (row.flagged, row.token, row.per_1000) == (Rate.of(0, 1), None, None)
