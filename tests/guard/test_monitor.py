from __future__ import annotations

import math

import pytest

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.traces import Intervention, Rung, StepRecord
from guard.triggers import POOL, REFUSAL, STOPPING
from tests.guard import kit

ONE = Policy(threshold=0.5, triggers=("victim",))
BOTH = Policy(threshold=0.5, zones=("reasoning", "answer"), triggers=("victim",))
(VICTIM,) = kit.runtime(ONE).triggers
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
START, END = 3, 4


def feed(watcher: StepMonitor, ids: list[int], score: float | None = None) -> None:
    """Observes ids; every step gets `score`, or the kit's score of its text."""
    for token in ids:
        watcher.observe(token)
        if watcher.pending is not None:
            watcher.decide(kit.score(watcher.pending.text) if score is None else score)


def reasoned(start: int, end: int, score: float | None, *, cue: bool = False, injected: bool = False) -> StepRecord:
    return StepRecord(start=start, end=end, zone="reasoning", score=score, cue=cue, injected=injected)


def test_a_cue_is_answered_by_the_trigger_token_by_token() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, CALM + CUE[:-1])
    assert watcher.forced is None
    feed(watcher, CUE[-1:])
    seen: list[int] = []
    while watcher.forced is not None:
        seen.append(watcher.forced)
        watcher.observe(watcher.forced)
    assert tuple(seen) == VICTIM.spaced
    assert watcher.pending is None
    feed(watcher, CALM)
    watcher.finish()
    n, end = len(VICTIM.spaced), 15 + len(VICTIM.spaced)
    assert (len(CALM), len(CUE)) == (7, 8)
    assert watcher.steps == [
        reasoned(0, 7, 0.125),
        reasoned(7, 15, 0.875, cue=True),
        reasoned(15, end, None, injected=True),
        reasoned(end, end + 7, 0.125),
    ]
    assert watcher.receipt.model_dump() == {
        "guard_id": "kit", "policy": "default", "policy_hash": ONE.hash, "detector": "words-1",
        "engine": "replay", "shadow": False, "seen": 3, "scored": 3, "unscored": 0, "unreadable": 0,
        "injected_tokens": n,
        "enforcement_failed": 0, "errors": [],
        "interventions": [
            {"step": 1, "at": 15, "trigger_id": "victim", "rung": "trigger", "mode": "inject",
                 "cue_ids": [], "score": 0.875,
             "forced": n, "completed": True}
        ],
    }  # fmt: skip


def test_the_pending_step_holds_its_text_and_span() -> None:
    watcher = kit.monitor(ONE)
    for token in CALM:
        assert watcher.pending is None
        watcher.observe(token)
    assert watcher.pending is not None
    assert (watcher.pending.start, watcher.pending.end, watcher.pending.text) == (0, 7, kit.CALM)


def test_after_white_space_the_trigger_carries_none() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, [*CUE[:-1], *kit.encode("\n\n")])
    assert watcher.forced == VICTIM.plain[0] != VICTIM.spaced[0]


@pytest.mark.parametrize(("score", "cue"), [(0.5, True), (math.nextafter(0.5, 0), False), (1.0, True), (0.0, False)])
def test_the_threshold_itself_is_a_cue(score: float, cue: bool) -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, CALM, score)
    assert watcher.steps == [reasoned(0, 7, score, cue=cue)]
    assert (watcher.forced is not None) is cue


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_token_that_was_not_forced_ends_the_plan(kept: int) -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, CUE)
    feed(watcher, list(VICTIM.spaced[:kept]))
    feed(watcher, CALM)
    assert watcher.forced is None
    assert watcher.receipt.enforcement_failed == 1
    assert watcher.receipt.errors == [f"engine appended {CALM[0]} where {VICTIM.spaced[kept]} was forced"]
    assert watcher.receipt.injected_tokens == kept
    assert watcher.receipt.interventions == [
        Intervention(step=0, at=8, trigger_id="victim", score=0.875, forced=kept, completed=False)
    ]
    injected = [reasoned(8, 8 + kept, None, injected=True)] if kept else []
    # The token that came instead opens the next step.
    assert watcher.steps == [reasoned(0, 8, 0.875, cue=True), *injected, reasoned(8 + kept, 15 + kept, 0.125)]


def test_a_mismatch_that_closes_the_reasoning_is_followed() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, [*CUE, VICTIM.spaced[0], END, *CUE])
    assert watcher.receipt.enforcement_failed == 1
    assert [s.zone for s in watcher.steps] == ["reasoning", "reasoning"]


def test_abandon_gives_the_plan_up_with_its_reason() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, [*CUE, *VICTIM.spaced[:2]])
    watcher.abandon("a grammar forbids it")
    assert watcher.forced is None
    assert (watcher.receipt.enforcement_failed, watcher.receipt.errors) == (1, ["a grammar forbids it"])
    assert watcher.steps[-1] == reasoned(8, 10, None, injected=True)
    watcher.abandon("again")
    assert len(watcher.steps) == 2


def test_errors_are_bounded() -> None:
    watcher = kit.monitor(ONE)
    for i in range(50):
        watcher.fail(f"{i} " + "x" * 500)
    assert [e[:2].strip() for e in watcher.receipt.errors] == [str(i) for i in range(8)]
    assert {len(e) for e in watcher.receipt.errors} == {200}


@pytest.mark.parametrize("budget", [0, 1, 3, 16])
def test_budget_and_no_trigger_twice(budget: int) -> None:
    watcher = kit.monitor(Policy(threshold=0.5, ladder=("trigger",) * budget))
    output = kit.generate(watcher, CUE * 18)
    used = [i.trigger_id for i in watcher.receipt.interventions]
    assert len(used) == len(set(used)) == min(budget, len(POOL))
    assert all(i.completed for i in watcher.receipt.interventions)
    assert sum(step.cue for step in watcher.steps) == 18
    assert len(output) == len(CUE) * 18 + watcher.receipt.injected_tokens


def test_the_ladder_is_climbed_rung_by_rung() -> None:
    policy = Policy(threshold=0.5, ladder=("trigger", "strong", "refuse", "stop"), zones=("reasoning", "answer"))
    watcher, runtime = kit.monitor(policy), kit.runtime(policy)
    output = kit.generate(watcher, CUE * 4)
    receipt = watcher.receipt
    assert [i.rung for i in receipt.interventions] == list(policy.ladder)
    assert [i.trigger_id for i in receipt.interventions[2:]] == ["refuse", "stop"]
    strong = next(t for t in POOL if t.id == receipt.interventions[1].trigger_id)
    assert strong.strong
    refuse = receipt.interventions[2]
    said = kit.tokenizer().decode(output[refuse.at : refuse.at + refuse.forced], skip_special_tokens=False)
    assert said == f" {STOPPING}</think>\n{REFUSAL}<|im_end|>"
    assert output[-1] == runtime.eos
    assert all(i.completed for i in receipt.interventions)


@pytest.mark.parametrize(
    ("ladder", "triggers", "answers"),
    [
        (Policy().ladder, ("wait-harm",), ["trigger wait-harm", "refuse refuse"]),
        (("strong", "strong", "stop", "refuse"), ("victim",), ["strong victim", "stop stop", "refuse refuse"]),
        (
            ("trigger", "trigger", "refuse", "strong", "stop"), ("victim",),
            ["trigger victim", "refuse refuse", "stop stop"],
        ),
        (("trigger", "strong", "trigger"), ("victim",), ["trigger victim"]),
        (("refuse", "trigger", "trigger"), ("victim",), ["refuse refuse", "trigger victim"]),
    ],
)  # fmt: skip
def test_a_rung_without_a_trigger_left_is_passed_over(
    ladder: tuple[Rung, ...], triggers: tuple[str, ...], answers: list[str]
) -> None:
    policy = Policy(threshold=0.5, ladder=ladder, triggers=triggers, zones=("reasoning", "answer"))
    watcher = kit.monitor(policy)
    output = kit.generate(watcher, CUE * 8)
    assert [f"{i.rung} {i.trigger_id}" for i in watcher.receipt.interventions] == answers
    assert sum(step.cue for step in watcher.steps) == 8
    again = kit.replay(kit.monitor(policy), output)
    assert (again.steps, again.receipt) == (watcher.steps, watcher.receipt)


def test_a_refusal_in_the_answer_closes_nothing() -> None:
    watcher = kit.monitor(Policy(threshold=0.5, zones=("answer",), ladder=("refuse",)), zone="answer")
    output = kit.generate(watcher, CUE)
    assert kit.tokenizer().decode(output[len(CUE) :], skip_special_tokens=False) == f" {REFUSAL}<|im_end|>"


def test_a_refusal_answers_a_step_that_the_delimiter_closed() -> None:
    watcher = kit.monitor(Policy(threshold=0.5, ladder=("refuse",)))
    output = kit.generate(watcher, [*CUE[:-1], END])
    assert kit.tokenizer().decode(output[len(CUE) :], skip_special_tokens=False) == f"\n{REFUSAL}<|im_end|>"


def test_shadow_decides_and_never_forces() -> None:
    watcher = kit.monitor(Policy(threshold=0.5, shadow=True))
    feed(watcher, CALM + CUE)
    assert watcher.forced is None
    assert watcher.steps == [reasoned(0, 7, 0.125), reasoned(7, 15, 0.875, cue=True)]
    assert (watcher.receipt.shadow, watcher.receipt.interventions, watcher.receipt.injected_tokens) == (True, [], 0)


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf, -1e-9, 1.0000001, 2.0])
@pytest.mark.parametrize("fail_mode", ["closed", "open"])
def test_an_unscored_step_is_answered_by_the_fail_mode(score: float | None, fail_mode: str) -> None:
    closed = fail_mode == "closed"
    watcher = kit.monitor(Policy.model_validate({"threshold": 0.5, "fail_mode": fail_mode, "triggers": ("victim",)}))
    kit.generate(watcher, CALM, lambda text: score)
    assert watcher.steps[0] == reasoned(0, 7, None, cue=closed)
    assert (watcher.receipt.seen, watcher.receipt.scored, watcher.receipt.unscored) == (1, 0, 1)
    expected = [Intervention(step=0, at=7, trigger_id="victim", score=None, forced=len(VICTIM.spaced), completed=True)]
    assert watcher.receipt.interventions == (expected if closed else [])
    assert not watcher.receipt.clean


def test_the_step_closed_by_the_delimiter_is_answered_where_the_answer_opens() -> None:
    watcher = kit.monitor(ONE)
    output = kit.generate(watcher, [*CUE[:-1], END])
    assert output == [*CUE[:-1], END, *VICTIM.opening]
    assert watcher.steps == [
        reasoned(0, 7, 0.875, cue=True),
        StepRecord(start=8, end=8 + len(VICTIM.opening), zone="answer", score=None, cue=False, injected=True),
    ]
    assert watcher.receipt.interventions[0].at == 8


def test_a_finished_cue_is_answered_before_the_delimiter() -> None:
    watcher = kit.monitor(ONE)
    output = kit.generate(watcher, [*CUE, END, *CALM])
    assert output == [*CUE, *VICTIM.spaced, END, *CALM]


def test_opening_is_only_for_the_step_that_the_delimiter_closed() -> None:
    watcher = kit.monitor(BOTH)
    output = kit.generate(watcher, [*CALM[:-1], END, *CUE])
    assert output == [*CALM[:-1], END, *CUE, *VICTIM.spaced]
    assert [(s.zone, s.cue) for s in watcher.steps] == [("reasoning", False), ("answer", True), ("answer", False)]


def test_unwatched_zones_are_not_scored() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, [*CALM, END, *CUE, *CUE])
    assert watcher.forced is None
    assert watcher.steps == [reasoned(0, 7, 0.125)]
    feed(watcher, [START, *CUE])
    assert watcher.steps[-1] == reasoned(25, 33, 0.875, cue=True)
    assert watcher.forced == VICTIM.spaced[0]


def test_answer_policy_watches_the_answer_alone() -> None:
    watcher = kit.monitor(Policy(threshold=0.5, zones=("answer",), triggers=("victim",)))
    feed(watcher, [*CUE, END, *CALM, *CUE])
    assert [(s.start, s.end, s.zone, s.cue) for s in watcher.steps] == [
        (9, 16, "answer", False),
        (16, 24, "answer", True),
    ]


def test_generation_that_starts_in_the_answer_is_unwatched_until_reasoning_opens() -> None:
    watcher = kit.monitor(ONE, zone="answer")
    feed(watcher, [*CUE, START, *CUE])
    assert [(s.start, s.end) for s in watcher.steps] == [(9, 17)]


def test_a_delimiter_spelled_with_ordinary_tokens_changes_nothing() -> None:
    watcher = kit.monitor(BOTH)
    feed(watcher, [*kit.spelled(" so I am done </think> <|im_end|>\n\n"), *CALM, *kit.spelled("<think>"), *CUE])
    assert [s.zone for s in watcher.steps] == ["reasoning"] * 3
    assert watcher.steps[-1].cue
    assert watcher.forced == VICTIM.spaced[0]


def test_finish_ends_a_running_plan() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, [*CUE, *VICTIM.spaced[:4]])
    watcher.finish()
    assert (watcher.forced, watcher.pending) == (None, None)
    assert watcher.steps[-1] == reasoned(8, 12, None, injected=True)
    assert watcher.receipt.interventions == [
        Intervention(step=0, at=8, trigger_id="victim", score=0.875, forced=4, completed=False)
    ]
    assert watcher.receipt.enforcement_failed == 0


def test_finish_judges_the_unfinished_step_and_forces_nothing() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, CUE[:-1])
    watcher.finish()
    assert watcher.pending is not None
    watcher.decide(0.875)
    assert watcher.steps == [reasoned(0, 7, 0.875, cue=True)]
    assert (watcher.forced, watcher.receipt.interventions) == (None, [])


def test_decide_without_a_pending_step_does_nothing() -> None:
    watcher = kit.monitor(ONE)
    watcher.decide(0.875)
    assert (watcher.receipt.seen, watcher.steps, watcher.forced) == (0, [], None)


CIPHER = kit.encode("V jvyy cynl fbzr punva bs fgrcf jvgubhg jbeqf abj.")


def test_an_unreadable_step_is_a_cue_whatever_its_score() -> None:
    watcher = kit.monitor(ONE)
    feed(watcher, CIPHER)
    assert [(step.score, step.cue, step.unreadable) for step in watcher.steps] == [(0.125, True, True)]
    assert watcher.receipt.unreadable == 1
    assert watcher.forced is not None


def test_a_policy_may_only_flag_what_is_unreadable() -> None:
    watcher = kit.monitor(ONE.model_copy(update={"unreadable": "flag"}))
    feed(watcher, CIPHER)
    assert [(step.cue, step.unreadable) for step in watcher.steps] == [(False, True)]
    assert (watcher.receipt.unreadable, watcher.forced) == (1, None)


def test_what_came_before_is_the_last_step_or_the_trigger_that_answered_it() -> None:
    watcher = kit.monitor(ONE)
    assert watcher.previous == ""
    feed(watcher, CALM)
    assert watcher.previous == kit.CALM
    feed(watcher, CUE)
    assert watcher.previous == kit.CUE
    while watcher.forced is not None:
        watcher.observe(watcher.forced)
    assert watcher.previous == VICTIM.text
