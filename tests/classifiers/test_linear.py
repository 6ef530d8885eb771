"""One linear head: its sums, its grid, its errors."""

from __future__ import annotations

import numpy as np
import pytest

from classifiers.linear import Head, fit_head, plain
from guard.errors import UserError


def test_logits_are_weighted_sums() -> None:
    head = Head(np.array([0.0, 1.0, -2.0]), 0.5)
    assert head.logits([([1, 2], [2.0, 0.5]), ([], [])]).tolist() == [1.5, 0.5]
    assert head([([], [])])[0] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert head.rescaled(2.0, 1.0).logits([([1], [1.0])]).tolist() == [4.0]


def test_snapped_weights_lie_on_the_grid() -> None:
    head = Head(np.array([0.0, 1 / 3]), 0.1).snapped()
    assert (head.weights * 2**17 % 1).tolist() == [0.0, 0.0]
    assert head.bias * 2**17 % 1 == 0.0
    assert head.weights[1] == pytest.approx(1 / 3, abs=2**-18)


def test_a_fit_tells_the_classes_apart_and_leaves_unused_ids_alone() -> None:
    head = fit_head(plain([[1], [2]] * 5), [True, False] * 5, [1.0] * 10, 10.0, 8, "test")
    assert head.weights[1] > 0 > head.weights[2]
    assert head.weights[[0, 3, 7]].tolist() == [0.0, 0.0, 0.0]


def test_one_class_only_is_refused() -> None:
    with pytest.raises(UserError, match="the test head has 2 rows of one class only"):
        fit_head(plain([[1], [2]]), [True, True], [1.0, 1.0], 1.0, 8, "test")
