"""One linear head over a hashed table: what both the detector and the judge are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from classifiers.export import snap
from classifiers.features import Weighted
from guard.errors import UserError

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Head:
    """Weights [table size] and bias."""

    weights: Floats
    bias: float

    def logits(self, rows: Sequence[Weighted]) -> Floats:
        """Return logits [n] of weighted rows."""
        return np.array([float(np.dot(self.weights[ids], weights)) for ids, weights in rows]) + self.bias

    def __call__(self, rows: Sequence[Weighted]) -> Floats:
        """Return probabilities [n] of weighted rows."""
        return np.asarray(1 / (1 + np.exp(-self.logits(rows))))

    def rescaled(self, slope: float, shift: float) -> Head:
        """Return the head whose logits are slope * logits + shift."""
        return Head(self.weights * slope, self.bias * slope + shift)

    def snapped(self) -> Head:
        """Return the head with weights and bias on the export grid."""
        return Head(snap(self.weights), float(snap(np.array([self.bias]))[0]))


def plain(rows: Iterable[list[int]]) -> list[Weighted]:
    """Give every id of every row the weight 1."""
    return [(ids, [1.0] * len(ids)) for ids in rows]


def fit_head(
    rows: Sequence[Weighted],
    labels: Sequence[bool],
    weights: Sequence[float],
    strength: float,
    table_size: int,
    name: str,
) -> Head:
    """Fit a logistic regression, classes balanced, on weighted rows of ids; UserError when one class is missing.

    `weights` [n] are the rows'; `strength` is the inverse of the regularisation.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:
        raise UserError(
            f"the {name} head has {len(labels)} rows of one class only",
            wanted="rows of both classes",
            fix="Give rows of both classes, on at least ten topics",
        )
    flat = np.concatenate([np.asarray(ids, np.int64) for ids, _ in rows])
    values = np.concatenate([np.asarray(line, float) for _, line in rows])
    used, columns = np.unique(flat, return_inverse=True)
    starts = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    matrix = csr_matrix((values, columns, starts), shape=(len(rows), len(used)))
    model = LogisticRegression(C=strength, class_weight="balanced", solver="liblinear", random_state=0)
    model.fit(matrix, np.asarray(labels), sample_weight=np.asarray(weights))
    table = np.zeros(table_size)
    table[used] = model.coef_[0]
    return Head(table, float(model.intercept_[0]))
