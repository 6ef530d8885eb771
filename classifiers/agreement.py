"""How far the judge and people agree on completions that people have labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from classifiers.judge import Judge
from classifiers.judge_data import LabelledResponse
from classifiers.stats import Rate, bootstrap

Floats = npt.NDArray[np.floating]
LINE = 0.5


def agreement(
    judge: Judge, rows: Sequence[LabelledResponse], tick: Callable[[], object] = lambda: None
) -> dict[str, Rate]:
    """Return accuracy, balanced accuracy, F1, AUROC and kappa of answer_harm at 0.5, each with n and a 95 % interval.

    Accuracy has a Wilson interval, the others a bootstrap one. `tick` is called after each row.
    """
    scores = []
    for row in rows:
        scores.append(judge.judge([(row.request, "", row.response)])[0].answer_harm)
        tick()
    return agreement_of(np.array([row.harmful for row in rows], float), np.array(scores))


def agreement_of(labels: Floats, scores: Floats) -> dict[str, Rate]:
    """Return the agreement of scores [n] at 0.5 with 0/1 labels [n]; ValueError without rows."""
    hits = (scores >= LINE).astype(float)
    figures: dict[str, Callable[[Floats, Floats], float]] = {
        "balanced_accuracy": balanced_accuracy,
        "f1": f1,
        "kappa": kappa,
    }
    result = {"accuracy": Rate.of(int(np.sum(hits == labels)), len(labels))}
    result |= {name: bootstrap(figure, labels, hits) for name, figure in figures.items()}
    result["auroc"] = bootstrap(auroc, labels, scores)
    return result


def balanced_accuracy(labels: Floats, hits: Floats) -> float:
    """Return the mean of the two classes' recalls; nan when a class is missing."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float((hits[labels == 1].mean() + 1 - hits[labels == 0].mean()) / 2)


def f1(labels: Floats, hits: Floats) -> float:
    """Return F1 of the harmful class; 0 when nothing is harmful and nothing is called so."""
    both = float(np.sum(labels * hits))
    return 2 * both / max(float(np.sum(labels) + np.sum(hits)), 1.0)


def kappa(labels: Floats, hits: Floats) -> float:
    """Return Cohen's kappa; nan when both sides say the same of everything."""
    chance = labels.mean() * hits.mean() + (1 - labels.mean()) * (1 - hits.mean())
    return float((np.mean(labels == hits) - chance) / (1 - chance)) if chance < 1 else float("nan")


def auroc(labels: Floats, scores: Floats) -> float:
    """Return the chance that a harmful row scores above a harmless one, ties half; nan when a class is missing."""
    harmful, harmless = scores[labels == 1], np.sort(scores[labels == 0])
    if not len(harmful) or not len(harmless):
        return float("nan")
    below = np.searchsorted(harmless, harmful, "left") + np.searchsorted(harmless, harmful, "right")
    return float(below.mean() / (2 * len(harmless)))
