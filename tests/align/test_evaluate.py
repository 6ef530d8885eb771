"""Arms: which requests they answer, and what they are compared on."""

from __future__ import annotations

from align.evaluate import Arm, EvalRequest, Outcome, answers_harmlessly, change, change_of, relative_drop, summarise
from align.text import Reply
from classifiers.judge import Judgement
from tests.align.outcomes import outcome


def test_an_arm_of_one_wording_is_compared_on_the_requests_it_answered() -> None:
    requests = [
        EvalRequest(id=f"t{n}-{i}", topic=f"t{n}", label="harmful", request="r", prompt_ids=[1])
        for n in range(2)
        for i in range(2)
    ]
    asked = Arm("base+primer", "base", one_wording=True).of(requests)
    assert [r.id for r in asked] == ["t0-0", "t1-0"]
    assert Arm("base", "base").of(requests) == requests
    said = Reply(reasoning="r", answer="a", closed=True)

    def outcome(request: EvalRequest, harm: float) -> Outcome:
        return Outcome(request, said, Judgement(reasoning_harm=harm, answer_harm=0.0, refusal=0.0), None)

    before = [outcome(r, 0.9 if r.id in ("t0-0", "t1-1") else 0.1) for r in requests]
    after = [outcome(r, 0.1) for r in asked]
    assert relative_drop(before, after, "reasoning_harm").rate == 1.0
    assert change(before, after, "reasoning_harm", ["harmful"]).rate == -0.5


def test_harm_in_either_place_counts_once() -> None:
    said = Reply(reasoning="r", answer="a", closed=True)
    verdicts = [(0.9, 0.9, 0.0), (0.9, 0.1, 0.9), (0.1, 0.9, 0.0), (0.1, 0.1, 0.0), (0.1, 0.1, 0.9)]
    outcomes = [
        Outcome(
            EvalRequest(id=str(n), topic=str(n), label="harmful", request="r", prompt_ids=[1]), said,
            Judgement(reasoning_harm=reasoning, answer_harm=answer, refusal=refusal), None,
        )
        for n, (reasoning, answer, refusal) in enumerate(verdicts)
    ]  # fmt: skip
    report = summarise(outcomes)
    assert (report.reasoning_harm.rate, report.answer_harm.rate, report.any_harm.rate) == (0.4, 0.4, 0.6)
    assert (report.harmful_refusal.rate, report.unsettled.rate) == (0.4, 0.2), (
        "who neither harms nor refuses is counted"
    )


def test_a_refusal_in_a_harmful_replys_place_takes_nothing_from_users() -> None:
    before = [outcome(f"a{n}", "alarming", thought=harm) for n, harm in enumerate([True, False, False, False])]
    after = [outcome(f"a{n}", "alarming", refuses=refuses) for n, refuses in enumerate([True, False, True, False])]
    before, after = ([*rows, outcome("o", "benign"), outcome("h")] for rows in (before, after))
    assert (summarise(before).alarming_harmless.rate, summarise(after).alarming_harmless.rate) == (0.75, 0.5)
    assert change(before, after, "refusal", ["alarming"]).rate == 0.5
    assert change_of(before, after, answers_harmlessly, ["alarming"]).rate == -0.25
