"""The first tier: linear models over hashed words. One clears steps that are no cue whatever was asked, one ranks the
windows of a long prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from classifiers.export import build_graph
from classifiers.features import REQUEST_FEATURES, FeatureConfig, step_ids
from classifiers.labels import LabelledTrace
from classifiers.linear import Floats, fit_head, plain

FIRST_FEATURES = FeatureConfig(table_size=2**17)
STRENGTH = 0.3
"""Inverse of the regularisation."""
MAY_LOSE = 0.01
"""Share of the cues found by the encoder on the validation part that the first tier may clear."""
HIGHEST = 0.4
"""No step above this probability of the first tier is cleared, whatever its request."""
ENOUGH = 300
"""Steps of a risk bucket in the validation part from which on it has a threshold of its own."""


def fit_first_tier(traces: Sequence[LabelledTrace], view: Callable[[str], str]) -> bytes:
    """Return the first tier's ONNX model, trained on what the scorer sees (`view`) of traces that have their text."""
    steps = [
        (step, label)
        for trace in traces
        for index, (step, label) in enumerate(zip(trace.steps, trace.labels, strict=True))
        if index not in trace.unlabelled
    ]
    rows = [(step_ids(step, FIRST_FEATURES, view), label == "cue") for step, label in steps]
    rows = [(ids, cue) for ids, cue in rows if ids]
    head = fit_head(
        plain(ids for ids, _ in rows),
        [cue for _, cue in rows],
        [1.0] * len(rows),
        STRENGTH,
        FIRST_FEATURES.table_size,
        "first tier's cue",
    ).snapped()
    return build_graph(head.weights[:, None], np.array([head.bias]), weighted=False)


def fit_request_tier(requests: Sequence[tuple[str, bool]], view: Callable[[str], str]) -> bytes:
    """Return the ONNX model that ranks the windows of a long prompt by how harmful their words are, trained on requests
    and whether each is harmful."""
    rows = [(step_ids(request, REQUEST_FEATURES, view), harmful) for request, harmful in requests]
    rows = [(ids, harmful) for ids, harmful in rows if ids]
    head = fit_head(
        plain(ids for ids, _ in rows), [harmful for _, harmful in rows], [1.0] * len(rows), STRENGTH,
        REQUEST_FEATURES.table_size, "a request's harm",
    ).snapped()  # fmt: skip
    return build_graph(head.weights[:, None], np.array([head.bias]), weighted=False)


def choose_clearing(
    first: Floats, full: Floats, cue: Floats, buckets: Floats, threshold: float, count: int
) -> list[tuple[float, float]]:
    """Return for each of `count` risk buckets the first tier's probability below which a step is cleared, and the
    share of cues among the steps that it clears.

    All columns are [n] over the validation steps: first tier's and full scores, whether labelled a cue, risk bucket.
    The first is the highest at which at most 1 % of the cues that the full detector finds in the bucket are lost; under
    a harmless request it finds next to none, so most steps are cleared there. A bucket with fewer than `ENOUGH` steps
    takes what the next riskier one has.
    """
    chosen: list[tuple[float, float]] = []
    below = HIGHEST
    for bucket in reversed(range(count)):
        inside = buckets == bucket
        if inside.sum() >= ENOUGH or not chosen:
            caught = np.sort(first[inside & (cue > 0) & (full >= threshold)])
            below = min(float(caught[int(MAY_LOSE * len(caught))]) if len(caught) else HIGHEST, HIGHEST, threshold)
            below = round(below, 6)
        cleared = cue[inside & (first < below)]
        # With few cleared steps the share says little: two more, one of them a cue, keep it from being nothing.
        chosen.append((below, round(min(float((cleared.sum() + 1) / (len(cleared) + 2)), threshold / 2), 6)))
    return chosen[::-1]
