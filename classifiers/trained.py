"""Heads trained anew on vectors with their own threshold, as measurements need many of them: nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from classifiers.build import BuildConfig
from classifiers.head_fit import calibrate, fit_heads, score_traces
from classifiers.measure import choose_threshold, figures
from classifiers.network import Heads
from classifiers.stats import Rate
from classifiers.vectors import EncodedTrace, RiskVectors

KEPT = (
    "recall_complying_traces", "flagged_benign_traces", "flagged_alarming_traces", "flagged_deliberating_traces",
    "auroc_cue_vs_benign", "auroc_cue_vs_alarming", "auroc_cue_vs_deliberation",
)  # fmt: skip


class Trained(NamedTuple):
    """Heads with the threshold that was chosen for them."""

    heads: Heads
    threshold: float

    def figures(self, traces: Sequence[EncodedTrace]) -> dict[str, Rate]:
        """What they make of some traces."""
        found = figures(score_traces(self.heads, traces), self.threshold)
        return {name: found[name] for name in KEPT if name in found}


def train_heads(
    train: Sequence[EncodedTrace], validation: Sequence[EncodedTrace], risk: RiskVectors, config: BuildConfig
) -> Trained:
    """Train heads anew, calibrate them and choose their threshold on `validation`, by the vectors of whole steps."""
    heads = calibrate(fit_heads(train, validation, risk, config.heads), validation, risk)
    return Trained(heads, choose_threshold(score_traces(heads, validation), config.allowed))
