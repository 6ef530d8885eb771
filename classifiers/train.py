"""Trains the detector: two hashed linear models (how risky a request is, whether a step is a cue) in one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np

from classifiers.agreement import auroc
from classifiers.artifact import Manifest
from classifiers.data import LabelledRequest, LabelledStep, data_hash
from classifiers.export import build_graph, write_artifact
from classifiers.features import FeatureConfig, Weighted, request_features, risk_bucket, step_ids
from classifiers.linear import Floats, Head, fit_head, plain
from classifiers.openings import swap_opening
from classifiers.requests import PUBLIC_SHARE, describe, spread, unseen_sources
from classifiers.stats import Rate, bootstrap
from classifiers.threshold import TraceRow, choose_threshold, flagged_traces, step_traces
from guard.errors import UserError

HELD_OUT_TOPICS = 0.25
HELD_OUT_WORDINGS = 0.15
FOLDS = 5
PROBES = 200
_features = lru_cache(maxsize=8192)(request_features)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run."""

    seed: int = 0
    fpr: float = 0.01
    """Share of ordinary benign requests that may hold a step above the threshold."""
    fpr_alarming: float = 0.02
    """The same of benign requests that sound harmful."""
    strength: float = 0.5
    """Inverse of the step model's regularisation."""
    request_strength: float = 1.0
    public_share: float = PUBLIC_SHARE
    """Total weight of the public requests, beside 1 for all other requests."""
    features: FeatureConfig = field(default_factory=FeatureConfig)


@dataclass(frozen=True)
class Data:
    """What a detector learns from: steps, public requests for the risk alone, traces for the threshold alone."""

    steps: Sequence[LabelledStep]
    requests: Sequence[LabelledRequest] = ()
    traces: Sequence[TraceRow] = ()


@dataclass(frozen=True)
class Heads:
    """The request-risk head and the cue head."""

    risk: Head
    cue: Head

    def risks(self, requests: Iterable[str], features: FeatureConfig) -> Floats:
        """Return the risks [n] of requests."""
        return self.risk([_features(request, features) for request in requests])

    def ids(self, pairs: Sequence[tuple[str, str]], features: FeatureConfig) -> list[list[int]]:
        """Return the ids of (request, step) pairs, as the runtime would see them."""
        requests = list(dict.fromkeys(request for request, _ in pairs))
        risks = dict(zip(requests, self.risks(requests, features), strict=True))
        return [step_ids(step, risk_bucket(risks[request], features), features) for request, step in pairs]

    def scores(self, pairs: Sequence[tuple[str, str]], features: FeatureConfig) -> Floats:
        """Return the cue scores [n] of (request, step) pairs."""
        return self.cue(plain(self.ids(pairs, features)))


def train_detector(data: Data, out: Path, config: TrainConfig, say: Progress = lambda _: None) -> Manifest:
    """Choose the threshold and measure on held-out topics, then train on all rows and write the artifact to `out`.

    Topics are split, not steps, and where rows carry a wording, some wordings are held out too: a figure speaks of
    topics and sentences not seen in training. The figures and the threshold are those of models that did not see
    them; the written model has. UserError when a label is missing or too few topics are left to hold out.
    """
    learn, held = split(data.steps, config.seed)
    _check(learn, held)
    say("threshold")
    traces, peaks, risks = cross_fitted(data, config)
    threshold = choose_threshold(traces, peaks, {"alarming": config.fpr_alarming, "benign": config.fpr})
    say("training without the held-out topics")
    scores = fit_heads(Data(learn, data.requests), config).scores(_pairs(held), config.features)
    metrics = measure(held, scores, threshold) | flagged_traces(traces, peaks, threshold) | risks
    say("requests of sources left out")
    metrics |= unseen_sources(lambda inside: _risk_scorer(Data(data.steps, inside), config), data.requests)
    say("training on all topics")
    heads = fit_heads(data, config)
    probe = heads.ids(_pairs(held[:PROBES]), config.features)
    return write_artifact(
        out,
        "detector",
        build_graph(
            np.stack([heads.cue.weights, heads.risk.weights], axis=1),
            np.array([heads.cue.bias, heads.risk.bias]),
            weighted=True,
        ),
        (probe, None, np.stack([heads.cue(plain(probe)), heads.risk(plain(probe))], axis=1)),
        features=config.features,
        threshold=threshold,
        training_data=data_hash([*data.steps, *data.requests]),
        metrics=metrics,
        training=_told(data, config) | {"traces": len(traces), "measured_without": len(data.steps) - len(learn)},
    )


def _told(data: Data, config: TrainConfig) -> dict[str, str | int | float]:
    return {
        "seed": config.seed,
        "threshold_rule": f"lowest at which {config.fpr_alarming:g} of alarming and {config.fpr:g} of other benign "
        "traces (demo traces of 3 to 6 steps and other steps in eights, both sources alike) hold a flagged step; "
        "cross-fitted by topic",
        "rows": len(data.steps),
        **describe(data.requests),
    }


def fit_heads(data: Data, config: TrainConfig) -> Heads:
    """Return the heads trained on all of the data."""
    risk, folds = fit_risk(data, config)
    steps = [row for row in data.steps if row.step]
    ids = [step_ids(row.step, risk_bucket(folds[row.request], config.features), config.features) for row in steps]
    labels, weights = [row.label == "cue" for row in steps], [row.weight for row in steps]
    cue = fit_head(plain(ids), labels, weights, config.strength, config.features.table_size, "detector's cue")
    return Heads(risk, cue.snapped())


def _risk_scorer(data: Data, config: TrainConfig) -> Callable[[Sequence[LabelledRequest]], Floats]:
    known = _requests(data.steps)
    head = _fit_risk(known, {text: _features(text, config.features) for text in known}, data.requests, config)
    return lambda asked: head([_features(row.request, config.features) for row in asked])


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


def fit_risk(data: Data, config: TrainConfig) -> tuple[Head, dict[str, float]]:
    """Return the request-risk head and each request's risk as a head says that has not seen its topic.

    Steps are crossed with these out-of-fold risks; with its own training risks the step model would trust them too far.
    """
    known = _requests(data.steps)
    features = {request: _features(request, config.features) for request in known}
    risks = dict.fromkeys(known, 0.0)
    for fold in range(FOLDS):
        inside = {request: row for request, row in known.items() if _fold(row.topic, config.seed) != fold}
        outside = [request for request in known if request not in inside]
        if outside and len({row.request_label for row in inside.values()}) == 2:
            scores = _fit_risk(inside, features, data.requests, config)([features[request] for request in outside])
            risks |= dict(zip(outside, scores.tolist(), strict=True))
    return _fit_risk(known, features, data.requests, config), risks


def _fit_risk(
    known: dict[str, LabelledStep],
    features: dict[str, Weighted],
    public: Sequence[LabelledRequest],
    config: TrainConfig,
) -> Head:
    rows = [features[request] for request in known]
    rows += [_features(swap_opening(row.request), config.features) for row in public]
    total = config.public_share * sum(bool(row.step) for row in known.values())
    return fit_head(
        rows,
        [row.request_label == "harmful" for row in known.values()] + [row.label == "harmful" for row in public],
        [row.weight for row in known.values()] + spread(public, total),
        config.request_strength,
        config.features.table_size,
        "detector's risk",
    ).snapped()


def cross_fitted(data: Data, config: TrainConfig) -> tuple[list[TraceRow], Floats, dict[str, Rate]]:
    """Return traces, the highest score of each, and the risk's figures, all by heads that have not seen the topic.

    Known wordings count: under a misjudged request they score higher than new ones.
    """
    traces = [*step_traces(data.steps), *data.traces]
    kinds = {row.request: row.request_label == "harmful" for row in data.steps if row.step}
    topics = {row.request: row.topic for row in data.steps if row.step}
    peaks, risks = np.zeros(len(traces)), dict.fromkeys(kinds, 0.0)
    for fold in range(FOLDS):
        inside = [row for row in data.steps if not row.step or _fold(row.topic, config.seed) != fold]
        outside = [index for index, trace in enumerate(traces) if _fold(trace.group, config.seed) == fold]
        asked = [request for request in kinds if _fold(topics[request], config.seed) == fold]
        if not outside and not asked:
            continue
        heads = fit_heads(Data(inside, data.requests), config)
        risks |= dict(zip(asked, heads.risks(asked, config.features).tolist(), strict=True))
        for index in outside:
            trace = traces[index]
            scores = heads.scores([(trace.request, step) for step in trace.steps], config.features)
            peaks[index] = scores.max(initial=0.0)
    labels, scores = np.array(list(kinds.values()), float), np.array(list(risks.values()))
    accuracy = Rate.of(int(np.sum((scores >= 0.5) == labels)), len(labels))
    return traces, peaks, {"auroc_request": bootstrap(auroc, labels, scores), "accuracy_request": accuracy}


def _fold(topic: str, seed: int) -> int:
    return int(_share(seed, "fold", topic) * FOLDS)


def _pairs(rows: Iterable[LabelledStep]) -> list[tuple[str, str]]:
    return [(row.request, row.step) for row in rows]


def _by_request(rows: Sequence[LabelledStep], scores: Floats, request_label: str) -> dict[str, list[tuple[str, float]]]:
    groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        if row.request_label == request_label and row.step:
            groups[row.request].append((row.label, float(score)))
    return groups


def measure(held: Sequence[LabelledStep], scores: Floats, threshold: float) -> dict[str, Rate]:
    """Return the held-out figures of steps: cues found, false alarms a step and a request, area under the curve."""
    cells: dict[str, list[bool]] = defaultdict(list)
    for row, hit in zip(held, scores >= threshold, strict=True):
        if row.step:
            cells[f"flagged_{row.label}_steps_{row.request_label}"].append(bool(hit))
            if row.wording.startswith("planning/"):
                cells[f"flagged_planning_steps_{row.request_label}"].append(bool(hit))
    metrics = {name: Rate.of(sum(hits), len(hits)) for name, hits in sorted(cells.items())}
    harmful = [
        steps for steps in _by_request(held, scores, "harmful").values() if any(label == "cue" for label, _ in steps)
    ]
    caught = sum(any(label == "cue" and s >= threshold for label, s in steps) for steps in harmful)
    metrics["caught_harmful_requests"] = Rate.of(caught, len(harmful))
    labels = np.array([row.label == "cue" for row in held], float)
    metrics["auroc_step"] = bootstrap(auroc, labels, scores)
    return metrics
