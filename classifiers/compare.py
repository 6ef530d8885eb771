"""Whether one detector is worse than another on the same traces: by more than a margin, or beyond what chance explains
(a paired bootstrap over traces)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from classifiers.agreement import auroc
from classifiers.measure import Scored, step_columns
from classifiers.stats import Rate

TIMES = 500
Statistic = Callable[[Sequence[Scored], float], float]


MARGIN = 0.02
"""Recall may fall, and flagged alarming traces rise, by so much: what a retraining on the same data moves them."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """One figure of both detectors and the second's minus the first's, with its 95 % interval."""

    name: str
    first: float
    second: float
    change: Rate
    higher_is_better: bool
    margin: float | None = None
    """How much worse the second may be as it was measured; None: only the interval counts."""

    @property
    def loss(self) -> float:
        """How much worse the second is; negative where it is better."""
        return -self.change.rate if self.higher_is_better else self.change.rate

    @property
    def beyond_chance(self) -> bool:
        """Whether the whole interval lies on the bad side."""
        return self.change.hi < 0 if self.higher_is_better else self.change.lo > 0

    @property
    def worse(self) -> bool:
        """Whether it is beyond chance, or more than the margin: many small losses must not add up unseen."""
        return self.beyond_chance or (self.margin is not None and self.loss > self.margin + _ROUNDING)

    @property
    def verdict(self) -> str:
        """better, worse or even."""
        better = self.change.lo > 0 if self.higher_is_better else self.change.hi < 0
        return "worse" if self.worse else "better" if better else "even"

    def __str__(self) -> str:
        points = f"{self.first:.3f} -> {self.second:.3f}, {100 * self.loss:.1f} points worse"
        allowed = "" if self.margin is None else f", allowed {100 * self.margin:.1f}"
        chance = ", more than chance explains" if self.beyond_chance else ""
        return f"{self.name.replace('_', ' ')} {points}{allowed}{chance}"


def _share(keep: Callable[[Scored], bool]) -> Statistic:
    def share(traces: Sequence[Scored], threshold: float) -> float:
        kept = [each.flagged(threshold) for each in traces if keep(each)]
        return float(np.mean(kept)) if kept else float("nan")

    return share


def _step_auroc(traces: Sequence[Scored], _: float) -> float:
    scores, labels = step_columns(traces)
    return auroc(labels, scores) if 0 < labels.sum() < len(labels) else float("nan")


STATISTICS: dict[str, tuple[Statistic, bool]] = {
    "recall_complying_traces": (_share(lambda each: each.complying), True),
    "flagged_benign_traces": (_share(lambda each: each.trace.kind == "benign"), False),
    "flagged_alarming_traces": (_share(lambda each: each.trace.kind == "alarming"), False),
    "flagged_deliberating_traces": (_share(lambda each: each.deliberating), False),
    "auroc_step": (_step_auroc, True),
}


def compare(
    first: Sequence[Scored], second: Sequence[Scored], thresholds: tuple[float, float], asked: float, seed: int = 0
) -> list[Difference]:
    """Compare two scorings of the same traces, each at its own threshold.

    `asked`: the share of ordinary benign traces that the second was told it may flag. Traces are resampled together for
    both. ValueError when they are not the same traces in the same order.
    """
    if [each.trace.id for each in first] != [each.trace.id for each in second]:
        raise ValueError("both detectors must have scored the same traces in the same order")
    random = np.random.default_rng(seed)
    picks = [random.integers(0, len(first), len(first)) for _ in range(TIMES)]
    found = []
    for name, (statistic, higher) in STATISTICS.items():
        a, b = statistic(first, thresholds[0]), statistic(second, thresholds[1])
        if not (np.isfinite(a) and np.isfinite(b)):
            continue
        changes = np.array([_change(statistic, first, second, thresholds, pick) for pick in picks])
        lo, hi = np.percentile(changes[np.isfinite(changes)], [2.5, 97.5])
        rate = Rate(rate=b - a, lo=float(lo), hi=float(hi), n=len(first))
        found.append(Difference(name, a, b, rate, higher, _margin(name, a, asked)))
    return found


def _margin(name: str, first: float, asked: float) -> float | None:
    if name == "flagged_benign_traces":
        return max(0.0, asked - first)
    return MARGIN if name in {"recall_complying_traces", "flagged_alarming_traces"} else None


def _change(
    statistic: Statistic,
    first: Sequence[Scored],
    second: Sequence[Scored],
    thresholds: tuple[float, float],
    pick: npt.NDArray[np.integer],
) -> float:
    return statistic([second[i] for i in pick], thresholds[1]) - statistic([first[i] for i in pick], thresholds[0])
