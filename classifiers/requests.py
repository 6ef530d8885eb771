"""Public labelled requests as further data on how risky a request is, and what that is worth on sources not seen.

A public source often has one class only. Its wording then tells its class, so a figure on rows of a source that was
trained on says little; these figures leave whole sources out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from math import sqrt

import numpy as np

from classifiers.agreement import LINE, auroc
from classifiers.data import LabelledRequest
from classifiers.linear import Floats
from classifiers.stats import Rate, bootstrap

PUBLIC_SHARE = 0.15
"""Total weight of the public requests, beside 1 for all authored ones."""
Scorer = Callable[[Sequence[LabelledRequest]], Floats]


def spread(requests: Sequence[LabelledRequest], total: float) -> list[float]:
    """Return each row's weight: both classes weigh total / 2, and within a class a source weighs as its root count."""
    sizes = Counter((row.label, row.source) for row in requests)
    roots = {label: sum(sqrt(n) for (of, _), n in sizes.items() if of == label) for label, _ in sizes}
    return [total / 2 / sqrt(sizes[row.label, row.source]) / roots[row.label] for row in requests]


def unseen_sources(
    learn: Callable[[Sequence[LabelledRequest]], Scorer], requests: Sequence[LabelledRequest]
) -> dict[str, Rate]:
    """Return figures on sources left out of training; `learn` trains on the rows it is given and returns a scorer.

    Each source is left out alone: the share of its harmful and of its benign requests at 0.5 or above. Each pair of
    sources is left out together: the area under the curve of all their rows, where they hold both classes.
    """
    sources = sorted({row.source for row in requests})
    metrics: dict[str, Rate] = {}
    for count in (1, 2) if len(sources) > 1 else ():
        for left in combinations(sources, count):
            outside = [row for row in requests if row.source in left]
            harmful = np.array([row.label == "harmful" for row in outside])
            if count == 2 and len(set(harmful)) < 2:
                continue
            scores = learn([row for row in requests if row.source not in left])(outside)
            name = "_and_".join(left)
            if len(set(harmful)) == 2:
                metrics[f"auroc_request_unseen_{name}"] = bootstrap(auroc, harmful.astype(float), scores)
            if count == 1:
                metrics |= _risky(name, harmful, scores)
    return metrics


def _risky(name: str, harmful: Floats, scores: Floats) -> dict[str, Rate]:
    cells = {"harmful": scores[harmful == 1], "benign": scores[harmful == 0]}
    return {
        f"risky_{label}_unseen_{name}": Rate.of(int(np.sum(cell >= LINE)), len(cell))
        for label, cell in cells.items()
        if len(cell)
    }


def describe(requests: Sequence[LabelledRequest]) -> dict[str, str]:
    """Return what an artifact's manifest says of its public requests: rows and licence of each source."""
    sizes = Counter((row.source, row.licence) for row in requests)
    return {f"requests_{source}": f"{n} rows, licence {licence}" for (source, licence), n in sorted(sizes.items())}
