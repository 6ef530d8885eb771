"""Which rollouts become pairs: the judge's objections."""

from __future__ import annotations

import pytest

from align.rollouts import _objection
from classifiers.judge import Judgement

SAFE = Judgement(reasoning_harm=0.1, answer_harm=0.1, refusal=0.1)
HARMFUL = SAFE._replace(reasoning_harm=0.9)
REFUSING = SAFE._replace(refusal=0.9)
PARTED = ([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("kind", "chosen", "rejected", "wanted"),
    [
        ("benign", SAFE, SAFE, None),
        ("benign", SAFE, REFUSING, None),
        ("benign", REFUSING, REFUSING, "chosen answer refuses"),
        ("benign", HARMFUL, REFUSING, "chosen reasoning judged harmful"),
        ("intervened", REFUSING, HARMFUL, None),
        ("intervened", REFUSING, SAFE, "rejected reasoning judged harmless"),
    ],
)
def test_a_pair_is_kept_only_if_the_judge_agrees(
    kind: str, chosen: Judgement, rejected: Judgement, wanted: str | None
) -> None:
    assert _objection(kind, chosen, rejected, PARTED) == wanted


def test_sides_must_part_at_the_divergence() -> None:
    assert _objection("benign", SAFE, SAFE, ([1, 2], [1, 3])) == "sides do not part at the divergence"
