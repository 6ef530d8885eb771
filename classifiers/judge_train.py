"""Trains the judge: four linear heads over one hashed table, each calibrated on topics it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from classifiers.agreement import agreement_of, auroc
from classifiers.artifact import Manifest
from classifiers.data import LabelledRequest, data_hash
from classifiers.export import build_graph, check_parity, write_artifact
from classifiers.features import FeatureConfig, Weighted
from classifiers.hashed import HashedModel
from classifiers.judge import HEADS, MODEL_FILE
from classifiers.judge_data import JudgedRow
from classifiers.judge_features import JUDGE_FEATURES, answer_features, judge_request_features, reasoning_features
from classifiers.linear import Floats, Head, fit_head
from classifiers.openings import swap_opening
from classifiers.request_words import WORD_WEIGHT, word_requests
from classifiers.requests import PUBLIC_SHARE, describe, spread, unseen_sources
from classifiers.stats import Rate, bootstrap

FOLDS = 5
PROBES = 200
AUTHORED = ("authored", "demo")
"""Sources of rows whose requests are harmful or benign by construction."""
EXTRA_WEIGHT = 3.0
"""Of a human-labelled completion, beside 1 for an authored row."""


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of one training run; strengths are inverse regularisations."""

    seed: int = 0
    strength: float = 1.0
    request_strength: float = 3.0
    public_share: float = PUBLIC_SHARE
    """Total weight of the public requests, beside 1 for all other requests."""
    features: FeatureConfig = JUDGE_FEATURES


def train_judge(
    rows: Sequence[JudgedRow],
    out: Path,
    config: JudgeConfig,
    say: Callable[[str], None] = lambda _: None,
    requests: Sequence[LabelledRequest] = (),
) -> Manifest:
    """Train and calibrate the four heads and write the artifact to `out`.

    Every figure in the manifest is out-of-fold: a row is scored by a head that has not seen its topic or request.
    `requests` teach the risk head only.
    UserError when a head has rows of one class only.
    """
    say("request risk")
    risk, risks = fit_request_head(rows, config, requests)
    said = [answer_features(row.answer, risks[row.request], config.features) for row in rows]
    thought = [reasoning_features(row.reasoning, risks[row.request], config.features) for row in rows]
    heads = {"risk": risk}
    metrics = _risk_metrics(rows, risks, config, requests)
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
    return _write(rows, out, config, heads, metrics, probe, requests)


def _write(
    rows: Sequence[JudgedRow],
    out: Path,
    config: JudgeConfig,
    heads: dict[str, Head],
    metrics: dict[str, Rate],
    probe: Sequence[Weighted],
    requests: Sequence[LabelledRequest],
) -> Manifest:
    table = np.stack([heads[name].weights for name in HEADS], axis=1).astype(np.float32)
    payload = build_graph(table, np.array([heads[name].bias for name in HEADS]), weighted=True)
    wanted = np.stack([heads[name](probe) for name in HEADS], axis=1)
    return write_artifact(
        out,
        "judge",
        {MODEL_FILE: payload},
        lambda staged: check_parity(
            HashedModel((staged / MODEL_FILE).read_bytes(), MODEL_FILE).run,
            ([ids for ids, _ in probe], [weights for _, weights in probe], wanted),
        ),
        features=config.features,
        threshold=0.5,
        training_data=data_hash([*rows, *requests]),
        metrics=lambda _: metrics,
        training={"seed": config.seed, "rows": len(rows), **_sources(rows), **describe(requests)},
    )


def _sources(rows: Sequence[JudgedRow]) -> dict[str, int]:
    names = sorted({row.source for row in rows})
    return {f"rows_{name}": sum(row.source == name for row in rows) for name in names}


def _fold(seed: int, group: str) -> int:
    return crc32(f"{seed}/judge/{group}".encode()) % FOLDS


def fit_request_head(
    rows: Sequence[JudgedRow], config: JudgeConfig, requests: Sequence[LabelledRequest] = ()
) -> tuple[Head, dict[str, float]]:
    """Return the risk head and each request's risk as told by a head that has not seen its group."""
    known: dict[str, JudgedRow] = {}
    for row in rows:
        if row.risky is not None or row.request not in known:
            known[row.request] = row
    features = {request: judge_request_features(request, config.features) for request in known}
    folds = {request: _fold(config.seed, row.group) for request, row in known.items()}
    public = [judge_request_features(swap_opening(row.request), config.features) for row in requests]

    def fit_without(fold: int | None) -> Head:
        inside = [request for request, row in known.items() if row.risky is not None and folds[request] != fold]
        return _fit_risk([(features[r], bool(known[r].risky)) for r in inside], requests, public, config)

    risks: dict[str, float] = {}
    for fold in range(FOLDS):
        outside = [request for request in known if folds[request] == fold]
        scores = fit_without(fold)([features[request] for request in outside])
        risks |= dict(zip(outside, scores.tolist(), strict=True))
    return fit_without(None), risks


def _fit_risk(
    known: Sequence[tuple[Weighted, bool]],
    requests: Sequence[LabelledRequest],
    public: Sequence[Weighted],
    config: JudgeConfig,
) -> Head:
    words = word_requests()
    return fit_head(
        [row for row, _ in known] + [judge_request_features(row.request, config.features) for row in words] + [*public],
        [risky for _, risky in known]
        + [row.label == "harmful" for row in words]
        + [row.label == "harmful" for row in requests],
        [1.0] * len(known) + [WORD_WEIGHT] * len(words) + spread(requests, config.public_share * len(known)),
        config.request_strength,
        config.features.table_size,
        "judge's risk",
    )


def _risk_metrics(
    rows: Sequence[JudgedRow], risks: dict[str, float], config: JudgeConfig, requests: Sequence[LabelledRequest]
) -> dict[str, Rate]:
    """Return the risk head's figures on topics of the authored rows and on whole sources that it has not seen."""
    authored = {row.request: bool(row.risky) for row in rows if row.risky is not None and row.source in AUTHORED}
    scores = np.array([risks[request] for request in authored])
    metrics = {"risk_auroc": bootstrap(auroc, np.array(list(authored.values()), float), scores)}
    known = [(judge_request_features(request, config.features), risky) for request, risky in authored.items()]

    def learn(inside: Sequence[LabelledRequest]) -> Callable[[Sequence[LabelledRequest]], Floats]:
        public = [judge_request_features(swap_opening(row.request), config.features) for row in inside]
        head = _fit_risk(known, inside, public, config)
        return lambda asked: head([judge_request_features(row.request, config.features) for row in asked])

    return metrics | unseen_sources(learn, requests)


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
            features.table_size,
            f"judge's {name}",
        )
        logits[outside] = head.logits([rows[i] for i in outside])
    slope, shift = calibrate(logits, truth, mass)
    head = fit_head(rows, labels, weights, strength, features.table_size, f"judge's {name}").rescaled(slope, shift)
    return head, agreement_of(truth, 1 / (1 + np.exp(-(slope * logits + shift))))


def calibrate(logits: Floats, labels: Floats, weights: Floats) -> tuple[float, float]:
    """Return Platt's slope and shift, both classes given equal mass, so that 0.5 is the balanced line."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, class_weight="balanced").fit(logits[:, None], labels, sample_weight=weights)
    return float(model.coef_[0, 0]), float(model.intercept_[0])
