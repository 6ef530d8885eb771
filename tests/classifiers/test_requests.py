"""Public requests: their weights, and figures on sources left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from classifiers.data import LabelledRequest
from classifiers.linear import Floats
from classifiers.requests import Scorer, describe, spread, unseen_sources


def _rows(source: str, label: str, count: int) -> list[LabelledRequest]:
    return [
        LabelledRequest.model_validate({"request": f"{source} {label} {n}", "label": label, "source": source})
        for n in range(count)
    ]


ROWS = [*_rows("a", "harmful", 4), *_rows("b", "harmful", 1), *_rows("b", "benign", 9), *_rows("c", "benign", 4)]


def test_classes_weigh_alike_and_sources_by_their_root() -> None:
    weights = np.array(spread(ROWS, 10.0))
    assert weights.sum() == pytest.approx(10.0)
    assert weights[:5].sum() == pytest.approx(5.0)
    assert weights[:4].tolist() == pytest.approx([5 * 2 / 3 / 4] * 4)
    assert weights[4] == pytest.approx(5 * 1 / 3)
    assert weights[5:14].sum() == pytest.approx(5 * 3 / 5)
    assert spread([], 10.0) == []


def test_a_left_out_source_is_not_learned_from() -> None:
    seen: list[set[str]] = []

    def learn(inside: Sequence[LabelledRequest]) -> Scorer:
        known = {row.source for row in inside}
        seen.append(known)

        def score(asked: Sequence[LabelledRequest]) -> Floats:
            assert not known & {row.source for row in asked}
            return np.array([0.9 if row.label == "harmful" else 0.6 if row.source == "b" else 0.1 for row in asked])

        return score

    figures = {name: (rate.rate, rate.n) for name, rate in unseen_sources(learn, ROWS).items()}
    assert figures == {
        "risky_harmful_unseen_a": (1.0, 4),
        "auroc_request_unseen_b": (1.0, 10),
        "risky_harmful_unseen_b": (1.0, 1),
        "risky_benign_unseen_b": (1.0, 9),
        "risky_benign_unseen_c": (0.0, 4),
        "auroc_request_unseen_a_and_b": (1.0, 14),
        "auroc_request_unseen_a_and_c": (1.0, 8),
        "auroc_request_unseen_b_and_c": (1.0, 14),
    }
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}, {"c"}, {"b"}, {"a"}]


def test_one_source_alone_cannot_be_left_out() -> None:
    assert unseen_sources(lambda rows: lambda asked: np.zeros(len(asked)), _rows("a", "harmful", 3)) == {}


def test_sources_and_licences_are_described() -> None:
    assert describe(_rows("a", "harmful", 2)) == {"requests_a": "2 rows, licence not given"}
