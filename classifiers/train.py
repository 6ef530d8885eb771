"""Trains the detector: two hashed linear models (how risky a request is, whether a step is a cue) in one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import numpy.typing as npt

from classifiers.artifact import Manifest
from classifiers.data import LabelledStep, data_hash
from classifiers.export import build_graph, snap, write_artifact
from classifiers.features import FeatureConfig, request_ids, risk_bucket, step_ids
from classifiers.stats import Rate, bootstrap
from guard.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

HELD_OUT_TOPICS = 0.25
HELD_OUT_WORDINGS = 0.15
FOLDS = 5
PROBES = 200
FLOOR = 0.5
"""No threshold is lower: below it the model itself holds a step for no cue, whatever the benign requests allow."""
Floats = npt.NDArray[np.floating]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run."""

    seed: int = 0
    fpr: float = 0.05
    """Share of benign requests that may hold a step above the threshold."""
    strength: float = 0.5
    """Inverse of the step model's regularisation."""
    request_strength: float = 4.0
    features: FeatureConfig = field(default_factory=FeatureConfig)


@dataclass(frozen=True)
class Linear:
    """Weights [table size] and bias of one head, both on the export grid."""

    weights: npt.NDArray[np.float32]
    bias: float

    def __call__(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Return probabilities [n] of rows of ids."""
        logits = np.array([self.weights[list(row)].sum(dtype=np.float64) for row in rows]) + self.bias
        return np.asarray(1 / (1 + np.exp(-logits)))


def train_detector(
    rows: Sequence[LabelledStep], out: Path, config: TrainConfig, say: Progress = lambda _: None
) -> Manifest:
    """Choose the threshold and measure on held-out topics, then train on all rows and write the artifact to `out`.

    Topics are split, not steps, and where rows carry a wording, some wordings are held out too: a figure speaks of
    topics and sentences not seen in training. The figures and the threshold are those of the model that did not see
    them; the written model has. UserError when a label is missing or too few topics are left to hold out.
    """
    learn, held = split(rows, config.seed)
    _check(learn, held)
    say("training without the held-out topics")
    risk, cue = fit_heads(learn, config)
    risks = risk([request_ids(request, config.features) for request in _requests(held)])
    held_scores = score_rows(held, risk, cue, config)
    say("threshold")
    benign, benign_scores = cross_fitted(rows, config)
    threshold = choose_threshold(benign, benign_scores, config.fpr)
    metrics = measure(held, held_scores, threshold, risks)
    metrics["flagged_benign_requests_any_wording"] = flagged_requests(benign, benign_scores, threshold)
    say("training on all topics")
    risk, cue = fit_heads(rows, config)
    probe = _ids(held[:PROBES], risk, config)
    return write_artifact(
        out,
        "detector",
        build_graph(np.stack([cue.weights, risk.weights], axis=1), np.array([cue.bias, risk.bias]), weighted=False),
        (probe, None, np.stack([cue(probe), risk(probe)], axis=1)),
        features=config.features,
        threshold=threshold,
        training_data=data_hash(rows),
        metrics=metrics,
        training={
            "seed": config.seed,
            "fpr": config.fpr,
            "rows": len(rows),
            "measured_without": len(rows) - len(learn),
        },
    )


def fit_heads(rows: Sequence[LabelledStep], config: TrainConfig) -> tuple[Linear, Linear]:
    """Return the request-risk head and the cue head."""
    risk, folds = fit_risk(_requests(rows), config)
    steps = [row for row in rows if row.step]
    ids = [step_ids(row.step, risk_bucket(folds[row.request], config.features), config.features) for row in steps]
    labels, weights = [row.label == "cue" for row in steps], [row.weight for row in steps]
    return risk, fit(ids, labels, weights, config.strength, config.features)


def split(rows: Iterable[LabelledStep], seed: int) -> tuple[list[LabelledStep], list[LabelledStep]]:
    """Return (learn, held): by topic, and by wording where there is one; mixed rows belong to neither."""
    learn, held = [], []
    for row in rows:
        topic_out = _held_topic(row, seed)
        wording_out = _share(seed, "wording", row.wording) < HELD_OUT_WORDINGS if row.wording else topic_out
        if topic_out and wording_out:
            held.append(row)
        elif not topic_out and not wording_out:
            learn.append(row)
    return learn, held


def _held_topic(row: LabelledStep, seed: int) -> bool:
    return bool(row.step) and _share(seed, "topic", row.topic) < HELD_OUT_TOPICS


def _share(seed: int, what: str, key: str) -> float:
    return crc32(f"{seed}/{what}/{key}".encode()) / 2**32


def _check(learn: Sequence[LabelledStep], held: Sequence[LabelledStep]) -> None:
    for part, name in ((learn, "training"), (held, "held-out")):
        wanted = {(row.label == "cue", row.request_label) for row in part if row.step}
        if (True, "harmful") not in wanted or (False, "benign") not in wanted:
            topics = len({row.topic for row in part})
            raise UserError(
                f"the {name} part of the data cannot be used",
                got=f"{len(part)} rows on {topics} topics",
                wanted="cues under harmful requests and steps under benign ones",
                fix="Add topics of both kinds: a quarter of them is held out",
            )


def _requests(rows: Iterable[LabelledStep]) -> dict[str, LabelledStep]:
    """One row for each request, in order."""
    first: dict[str, LabelledStep] = {}
    for row in rows:
        first.setdefault(row.request, row)
    return first


def fit_risk(requests: dict[str, LabelledStep], config: TrainConfig) -> tuple[Linear, dict[str, float]]:
    """Return the request-risk head and each request's risk as a head says that has not seen its topic.

    Steps are crossed with these out-of-fold risks; with its own training risks the step model would trust them too far.
    """
    ids = [request_ids(request, config.features) for request in requests]
    labels = [row.request_label == "harmful" for row in requests.values()]
    weights = [row.weight for row in requests.values()]
    folds = np.array([_fold(row, config.seed) for row in requests.values()])
    risks = np.zeros(len(ids))
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if not len(outside) or len({labels[i] for i in inside}) < 2:
            continue
        head = fit(
            [ids[i] for i in inside],
            [labels[i] for i in inside],
            [weights[i] for i in inside],
            config.request_strength,
            config.features,
        )
        risks[outside] = head([ids[i] for i in outside])
    return fit(ids, labels, weights, config.request_strength, config.features), dict(
        zip(requests, risks.tolist(), strict=True)
    )


def fit(
    ids: Sequence[Sequence[int]],
    labels: Sequence[bool],
    weights: Sequence[float],
    strength: float,
    features: FeatureConfig,
) -> Linear:
    """Fit a logistic regression, classes balanced, on rows of ids; its weights are snapped to the export grid."""
    from sklearn.linear_model import LogisticRegression

    matrix, used = to_matrix(ids)
    model: LogisticRegression = LogisticRegression(
        C=strength, class_weight="balanced", solver="liblinear", random_state=0
    )
    model.fit(matrix, np.asarray(labels), sample_weight=np.asarray(weights))
    table = np.zeros(features.table_size, np.float32)
    table[used] = snap(model.coef_[0])
    return Linear(table, float(snap(model.intercept_)[0]))


def to_matrix(ids: Sequence[Sequence[int]]) -> tuple[csr_matrix, npt.NDArray[np.int64]]:
    """Return a 0/1 matrix [n, used] of rows of ids and the ids its columns stand for."""
    from scipy.sparse import csr_matrix

    flat = np.fromiter((i for row in ids for i in row), np.int64)
    used, columns = np.unique(flat, return_inverse=True)
    starts = np.cumsum([0, *map(len, ids)])
    return csr_matrix((np.ones(len(flat)), columns, starts), shape=(len(ids), len(used))), used


def cross_fitted(rows: Sequence[LabelledStep], config: TrainConfig) -> tuple[list[LabelledStep], Floats]:
    """Return the steps under benign requests and their scores by heads that have not seen their topic.

    Known wordings count: under a misjudged request they score higher than new ones.
    """
    found, scores = [], []
    for fold in range(FOLDS):
        outside = [row for row in rows if row.step and _fold(row, config.seed) == fold]
        benign = [row for row in outside if row.request_label == "benign"]
        if benign:
            inside = [row for row in rows if not row.step or _fold(row, config.seed) != fold]
            found += benign
            scores.append(score_rows(benign, *fit_heads(inside, config), config))
    return found, np.concatenate(scores)


def _fold(row: LabelledStep, seed: int) -> int:
    return int(_share(seed, "fold", row.topic) * FOLDS)


def _ids(rows: Sequence[LabelledStep], risk: Linear, config: TrainConfig) -> list[list[int]]:
    requests = list(_requests(rows))
    risks = dict(zip(requests, risk([request_ids(request, config.features) for request in requests]), strict=True))
    return [step_ids(row.step, risk_bucket(risks[row.request], config.features), config.features) for row in rows]


def score_rows(rows: Sequence[LabelledStep], risk: Linear, cue: Linear, config: TrainConfig) -> Floats:
    """Return the cue scores [n] of rows, scored as the runtime would."""
    return cue(_ids(rows, risk, config))


def _by_request(rows: Sequence[LabelledStep], scores: Floats, request_label: str) -> dict[str, list[tuple[str, float]]]:
    groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        if row.request_label == request_label and row.step:
            groups[row.request].append((row.label, float(score)))
    return groups


def choose_threshold(held: Sequence[LabelledStep], scores: Floats, fpr: float) -> float:
    """Return the lowest threshold at which at most a share `fpr` of benign requests holds a step at or above it."""
    peaks = sorted((max(s for _, s in steps) for steps in _by_request(held, scores, "benign").values()), reverse=True)
    allowed = int(fpr * len(peaks))
    # Half-way to the next peak, so that no measured step sits on the edge.
    first_kept = peaks[allowed]
    lowest_flagged = peaks[allowed - 1] if allowed else 1.0
    return round(min(max(FLOOR, (first_kept + lowest_flagged) / 2), 1 - 1e-6), 6)


def measure(held: Sequence[LabelledStep], scores: Floats, threshold: float, risks: Floats) -> dict[str, Rate]:
    """Return the held-out figures: cues found, false alarms a step and a request, areas under the curves."""
    from sklearn.metrics import roc_auc_score

    flagged = scores >= threshold
    cells: dict[str, list[bool]] = defaultdict(list)
    for row, hit in zip(held, flagged, strict=True):
        if row.step:
            cells[f"flagged_{row.label}_steps_{row.request_label}"].append(bool(hit))
    metrics = {name: Rate.of(sum(hits), len(hits)) for name, hits in sorted(cells.items())}
    harmful = [
        steps for steps in _by_request(held, scores, "harmful").values() if any(label == "cue" for label, _ in steps)
    ]
    metrics["flagged_benign_requests"] = flagged_requests(held, scores, threshold)
    caught = sum(any(label == "cue" and s >= threshold for label, s in steps) for steps in harmful)
    metrics["caught_harmful_requests"] = Rate.of(caught, len(harmful))
    labels = np.array([row.label == "cue" for row in held], float)
    metrics["auroc_step"] = bootstrap(_finite(roc_auc_score), labels, scores, times=300)
    kinds = np.array([row.request_label == "harmful" for row in _requests(held).values()], float)
    metrics["auroc_request"] = bootstrap(_finite(roc_auc_score), kinds, risks, times=300)
    metrics["accuracy_request"] = Rate.of(int(np.sum((risks >= 0.5) == kinds)), len(kinds))
    return metrics


def flagged_requests(rows: Sequence[LabelledStep], scores: Floats, threshold: float) -> Rate:
    """Return the share of benign requests with any step at or above the threshold."""
    groups = _by_request(rows, scores, "benign").values()
    return Rate.of(sum(any(score >= threshold for _, score in steps) for steps in groups), len(groups))


def _finite(score: Callable[[Floats, Floats], float]) -> Callable[[Floats, Floats], float]:
    """Make a two-class score answer nan, not an error, when a resample holds one class."""
    return lambda labels, scores: float(score(labels, scores)) if len(np.unique(labels)) == 2 else float("nan")
