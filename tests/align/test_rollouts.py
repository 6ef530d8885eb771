"""Which rollouts become pairs: objections of judge and seam, and what is counted."""

from __future__ import annotations

from collections import Counter

import pytest

from align.candidates import RolloutSettings, candidates
from align.rollouts import Harvest, Sides, _misfit, _objection
from align.rounds import Budget, Round
from align.seam import FALSE_EOS, SeamCheck, Side
from classifiers.judge import Judgement
from guard.steps import TokenTable
from tests.align.kit import ENCODED, source

SAFE = Judgement(reasoning_harm=0.1, answer_harm=0.1, refusal=0.1)
HARMFUL = SAFE._replace(reasoning_harm=0.9)
HELPING = SAFE._replace(answer_harm=0.9)
REFUSING = SAFE._replace(refusal=0.9)


@pytest.mark.parametrize(
    ("kind", "chosen", "rejected", "wanted"),
    [
        ("benign", SAFE, SAFE, None),
        ("benign", SAFE, REFUSING, None),
        ("benign", REFUSING, REFUSING, "chosen answer refuses"),
        ("benign", HARMFUL, REFUSING, "chosen reasoning judged harmful"),
        ("benign", HELPING, REFUSING, "chosen answer judged harmful"),
        ("intervened", HELPING, HARMFUL, "chosen answer judged harmful"),
        ("intervened", REFUSING, HARMFUL._replace(answer_harm=0.9), None),
        ("intervened", REFUSING, HARMFUL, None),
        ("intervened", REFUSING, SAFE, "rejected reasoning judged harmless"),
    ],
)
def test_a_pair_is_kept_only_if_the_judge_agrees(
    kind: str, chosen: Judgement, rejected: Judgement, wanted: str | None
) -> None:
    assert _objection(kind, chosen, rejected) == wanted


def test_sides_must_part_at_the_divergence_and_fit_to_the_prefix() -> None:
    (candidate,), _ = candidates([source()], ENCODED, RolloutSettings())
    seam = SeamCheck(TokenTable([b"a"] * 30), None, 20)

    def misfit(chosen: list[int], rejected: list[int]) -> str | None:
        return _misfit(candidate, Sides(Side((chosen,), "stop"), Side((rejected,), "length")), seam)

    assert misfit([1, 2], [3, 4]) is None
    for sides in (([1, 2], [1, 3]), ([], [1]), ([1], [])):
        assert misfit(*sides) == "sides do not part at the divergence"
    assert misfit([1, 20], [2, 3]) is None
    assert misfit([1, 2], [3, 20]) == FALSE_EOS
    assert misfit([20, 2], [3, 4]) == FALSE_EOS


def test_what_two_machines_brought_adds_up() -> None:
    one = Harvest(dropped=Counter(a=1), candidates=2, generations=Counter(x=3), rounds=[Round(generated=5)])
    two = Harvest(
        dropped=Counter(a=2, b=1), candidates=1, generations=Counter(x=1),
        rounds=[Round(generated=1, watched=4, returned=3), Round(generated=3)],
    )  # fmt: skip
    both = one + two
    assert both.dropped == {"a": 3, "b": 1}
    assert (both.candidates, both.generations) == (3, {"x": 4})
    assert both.rounds == [Round(generated=6, watched=4, returned=3), Round(generated=3)]
    assert Harvest.model_validate_json(both.model_dump_json()) == both


def test_a_budget_books_all_or_nothing_and_knows_a_request_by_its_words() -> None:
    budget = Budget(3)
    assert [budget.take("How so?", 2), budget.take("how  so?", 2), budget.take("HOW SO?")] == [True, False, True]
    assert not budget.take("how so?")
    assert budget.take("else", 3)
    assert budget.spent == {"how so?": 3, "else": 3}
