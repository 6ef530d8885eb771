"""Plots of one evaluation, as PNG: ROC, precision and recall, reliability, when a cue is first seen, shares by zone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from classifiers.measure import BINS, WITHIN_TOKENS, Floats, Scored, step_columns
from classifiers.zones import ZoneRates

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

INK, WARM, COOL, PALE = "#1c1e21", "#d55e00", "#0072b2", "#cfe4f2"
MOST = 6
"""Curves in one plot, the largest sources first."""


def draw(scored: Sequence[Scored], threshold: float, per_zone: ZoneRates, out: Path) -> list[Path]:
    """Write roc.png, precision_recall.png, reliability.png, first_detection.png and zones.png to `out`; return their
    paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    plots: tuple[tuple[str, Callable[[Axes], None]], ...] = (
        ("roc", lambda axes: _curves(axes, scored, roc=True)),
        ("precision_recall", lambda axes: _curves(axes, scored, roc=False)),
        ("reliability", lambda axes: _reliability(axes, scored)),
        ("first_detection", lambda axes: _first(axes, scored, threshold)),
        ("zones", lambda axes: _zones(axes, per_zone)),
    )
    for name, plot in plots:
        figure, axes = plt.subplots(figsize=(6, 4.2), dpi=130)
        plot(axes)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        path = out / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        written.append(path)
    return written


def _groups(scored: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    """All traces, and for each source its cues against all steps of benign requests."""
    benign = [each for each in scored if each.trace.kind != "harmful"]
    names = sorted({each.trace.source for each in scored})
    groups = [(name, [each for each in scored if each.trace.source == name]) for name in names]
    groups = [(name, part) for name, part in groups if any("cue" in each.trace.labels for each in part)]
    groups.sort(key=lambda item: -len(item[1]))
    return [("all", list(scored)), *((name, part + benign) for name, part in groups[: MOST - 1])]


def _curves(axes: Axes, scored: Sequence[Scored], *, roc: bool) -> None:
    from sklearn.metrics import precision_recall_curve, roc_curve

    for name, part in _groups(scored):
        scores, labels = step_columns(part)
        if not 0 < labels.sum() < len(labels):
            continue
        if roc:
            x, y, _ = roc_curve(labels, scores)
        else:
            y, x, _ = precision_recall_curve(labels, scores)
        axes.plot(x, y, label=f"{name} ({int(labels.sum())} cues)", lw=2.2 if name == "all" else 1.2)
    axes.set_xlabel("false alarms, share of other steps" if roc else "recall, share of cues found")
    axes.set_ylabel("recall, share of cues found" if roc else "precision, share of alarms that are cues")
    axes.set_title("Steps: ROC by source" if roc else "Steps: precision and recall by source", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8)


def _reliability(axes: Axes, scored: Sequence[Scored]) -> None:
    scores, labels = step_columns(scored)
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    found = [b for b in range(BINS) if np.any(bins == b)]
    said: Floats = np.array([scores[bins == b].mean() for b in found])
    seen: Floats = np.array([labels[bins == b].mean() for b in found])
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    axes.plot(said, seen, color=COOL, marker="o", lw=1.6)
    for x, y, b in zip(said, seen, found, strict=True):
        axes.annotate(str(int(np.sum(bins == b))), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.set_xlabel("score, mean of the bin (number of steps beside it)")
    axes.set_ylabel("share of steps that are cues")
    axes.set_title("Reliability", fontsize=11, loc="left")


def _first(axes: Axes, scored: Sequence[Scored], threshold: float) -> None:
    complying = [each for each in scored if each.complying]
    hits = [each.ends[np.flatnonzero(each.cues(threshold))] for each in complying]
    first = np.sort([float(each[0]) for each in hits if len(each)])
    if len(complying):
        axes.step([0, *first], np.arange(len(first) + 1) / len(complying), where="post", color=WARM, lw=2)
    axes.axvline(WITHIN_TOKENS, color=INK, lw=0.8, ls=":")
    axes.annotate(
        f"{WITHIN_TOKENS} tokens", (WITHIN_TOKENS, 0.02), fontsize=8, xytext=(4, 0), textcoords="offset points"
    )
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens of reasoning until the first flagged step has ended")
    axes.set_ylabel(f"share of {len(complying)} complying traces")
    axes.set_title("When a complying reasoning is first flagged", fontsize=11, loc="left")


def _zones(axes: Axes, per_zone: ZoneRates) -> None:
    """Every share of requests and steps that are flagged, with its interval, one mark a zone."""
    colours = {"reasoning": COOL, "answer": WARM}
    names = sorted({name for found in per_zone.values() for name in found if name.startswith(("recall_", "flagged_"))})
    for (zone, found), shift in zip(per_zone.items(), (0.15, -0.15), strict=True):
        rows = [(place + shift, found[name]) for place, name in enumerate(names) if name in found]
        shares = [rate.rate for _, rate in rows]
        ends = [[rate.rate - rate.lo for _, rate in rows], [rate.hi - rate.rate for _, rate in rows]]
        label = zone if rows else f"{zone}: nothing measured"
        axes.errorbar(shares, [y for y, _ in rows], xerr=ends, fmt="o", ms=4, lw=1, color=colours[zone], label=label)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share, 95 % interval")
    axes.set_title("Flagged, by zone", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8)
