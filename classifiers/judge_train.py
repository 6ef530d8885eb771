"""Trains the judge: four linear heads over one hashed table, each calibrated on topics it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from classifiers.agreement import agreement_of
from classifiers.artifact import Manifest
from classifiers.authored import word_rows
from classifiers.data import data_hash
from classifiers.export import build_graph, write_artifact
from classifiers.features import FeatureConfig
from classifiers.judge import HEADS
from classifiers.judge_data import JudgedRow
from classifiers.judge_features import (
    JUDGE_FEATURES,
    Weighted,
    answer_features,
    judge_request_features,
    reasoning_features,
)
from classifiers.stats import Rate
from guard.errors import UserError

FOLDS = 5
PROBES = 200
EXTRA_WEIGHT = 3.0
"""Of a human-labelled completion, beside 1 for an authored row."""
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of one training run; strengths are inverse regularisations."""

    seed: int = 0
    strength: float = 1.0
    request_strength: float = 3.0
    features: FeatureConfig = JUDGE_FEATURES


@dataclass(frozen=True)
class Head:
    """One linear head: weights [table size] and bias."""

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


def train_judge(
    rows: Sequence[JudgedRow], out: Path, config: JudgeConfig, say: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Train and calibrate the four heads and write the artifact to `out`.

    Every figure in the manifest is out-of-fold: a row is scored by a head that has not seen its topic or request.
    UserError when a head has rows of one class only.
    """
    say("request risk")
    risk, risks = fit_request_head(rows, config)
    said = [answer_features(row.answer, risks[row.request], config.features) for row in rows]
    thought = [reasoning_features(row.reasoning, risks[row.request], config.features) for row in rows]
    heads = {"risk": risk}
    metrics: dict[str, Rate] = {}
    for name, features in (("answer_harm", said), ("refusal", said), ("reasoning_harm", thought)):
        say(name.replace("_", " "))
        known = [i for i, row in enumerate(rows) if getattr(row, name) is not None and features[i][0]]
        heads[name], figures = fit_calibrated(
            [features[i] for i in known],
            [getattr(rows[i], name) for i in known],
            [rows[i].weight for i in known],
            [_fold(config.seed, rows[i].group) for i in known],
            config.strength,
            name,
            config.features,
        )
        metrics |= {f"{name}_{figure}": value for figure, value in figures.items()}
    probe = [row for row in said[:PROBES] + thought[:PROBES] if row[0]]
    return _write(rows, out, config, heads, metrics, probe)


def _write(
    rows: Sequence[JudgedRow],
    out: Path,
    config: JudgeConfig,
    heads: dict[str, Head],
    metrics: dict[str, Rate],
    probe: Sequence[Weighted],
) -> Manifest:
    table = np.stack([heads[name].weights for name in HEADS], axis=1).astype(np.float32)
    payload = build_graph(table, np.array([heads[name].bias for name in HEADS]), weighted=True)
    wanted = np.stack([heads[name](probe) for name in HEADS], axis=1)
    return write_artifact(
        out,
        "judge",
        payload,
        ([ids for ids, _ in probe], [weights for _, weights in probe], wanted),
        features=config.features,
        threshold=0.5,
        training_data=data_hash(rows),
        metrics=metrics,
        training={"seed": config.seed, "rows": len(rows), **_sources(rows)},
    )


def _sources(rows: Sequence[JudgedRow]) -> dict[str, int]:
    names = sorted({row.source for row in rows})
    return {f"rows_{name}": sum(row.source == name for row in rows) for name in names}


def _fold(seed: int, group: str) -> int:
    return crc32(f"{seed}/judge/{group}".encode()) % FOLDS


def fit_request_head(rows: Sequence[JudgedRow], config: JudgeConfig) -> tuple[Head, dict[str, float]]:
    """Return the risk head and each request's risk as told by a head that has not seen its group."""
    known: dict[str, JudgedRow] = {}
    for row in rows:
        if row.risky is not None or row.request not in known:
            known[row.request] = row
    features = {request: judge_request_features(request, config.features) for request in known}
    words = [
        (judge_request_features(row.request, config.features), row.request_label == "harmful", row.weight)
        for row in word_rows()
    ]
    folds = {request: _fold(config.seed, row.group) for request, row in known.items()}

    def fit_without(fold: int | None) -> Head:
        inside = [request for request, row in known.items() if row.risky is not None and folds[request] != fold]
        return fit_head(
            [features[request] for request in inside] + [w[0] for w in words],
            [bool(known[request].risky) for request in inside] + [w[1] for w in words],
            [1.0] * len(inside) + [w[2] for w in words],
            config.request_strength,
            "risk",
            config.features,
        )

    risks: dict[str, float] = {}
    for fold in range(FOLDS):
        outside = [request for request in known if folds[request] == fold]
        scores = fit_without(fold)([features[request] for request in outside])
        risks |= dict(zip(outside, scores.tolist(), strict=True))
    return fit_without(None), risks


def fit_calibrated(
    rows: Sequence[Weighted],
    labels: Sequence[bool],
    weights: Sequence[float],
    folds: Sequence[int],
    strength: float,
    name: str,
    features: FeatureConfig,
) -> tuple[Head, dict[str, Rate]]:
    """Return a head on all rows, its logits calibrated on out-of-fold ones, and the out-of-fold agreement."""
    logits, truth, mass = np.zeros(len(rows)), np.array(labels, float), np.array(weights)
    for fold in range(FOLDS):
        inside = [i for i in range(len(rows)) if folds[i] != fold]
        outside = [i for i in range(len(rows)) if folds[i] == fold]
        head = fit_head(
            [rows[i] for i in inside],
            [labels[i] for i in inside],
            [weights[i] for i in inside],
            strength,
            name,
            features,
        )
        logits[outside] = head.logits([rows[i] for i in outside])
    slope, shift = calibrate(logits, truth, mass)
    head = fit_head(rows, labels, weights, strength, name, features).rescaled(slope, shift)
    return head, agreement_of(truth, 1 / (1 + np.exp(-(slope * logits + shift))))


def calibrate(logits: Floats, labels: Floats, weights: Floats) -> tuple[float, float]:
    """Return Platt's slope and shift, both classes given equal mass, so that 0.5 is the balanced line."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, class_weight="balanced").fit(logits[:, None], labels, sample_weight=weights)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def fit_head(
    rows: Sequence[Weighted],
    labels: Sequence[bool],
    weights: Sequence[float],
    strength: float,
    name: str,
    features: FeatureConfig,
) -> Head:
    """Fit a logistic regression, classes balanced, on weighted rows of ids; UserError when one class is missing."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:
        raise UserError(
            f"the judge's {name} head has {len(labels)} rows of one class only",
            wanted="rows of both classes",
            fix="Give rows of both classes, on at least ten topics",
        )
    flat = np.concatenate([np.asarray(ids, np.int64) for ids, _ in rows])
    values = np.concatenate([np.asarray(line) for _, line in rows])
    used, columns = np.unique(flat, return_inverse=True)
    starts = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    matrix = csr_matrix((values, columns, starts), shape=(len(rows), len(used)))
    model = LogisticRegression(C=strength, class_weight="balanced", solver="liblinear", random_state=0)
    model.fit(matrix, np.asarray(labels), sample_weight=np.asarray(weights))
    table = np.zeros(features.table_size)
    table[used] = model.coef_[0]
    return Head(table, float(model.intercept_[0]))
