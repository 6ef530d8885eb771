"""Plots of CSR curves and of triggers' effects, as SVG files that stand alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.plots import COOL, GRID, INK, MUTED, WARM
from align.trigger_rank import PLACES, RankReport, Where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from align.csr import Kind
    from align.csr_report import CsrReport, ReasoningReport
    from classifiers.stats import Rate

#: Panels in a row, and at most in one figure; the inches of one.
ACROSS, PANELS, WIDE, HIGH = 4, 24, 3.0, 1.9
_LOOK = {"svg.fonttype": "none", "font.size": 8, "text.color": INK, "axes.edgecolor": MUTED, "text.parse_math": False}
_MARKS: dict[Where, str] = {"in its place": "o", "after it": "s", "later": "^"}


def curves(report: CsrReport, path: Path) -> None:
    """One panel a reasoning: the ratio with its interval over tokens, the turns (hollow: at the end), the first cue.

    Only the first `PANELS` reasonings are drawn.
    """
    rows = report.reasonings[:PANELS]
    down = max(1, -(-len(rows) // ACROSS))
    with _canvas((ACROSS * WIDE, down * HIGH + 0.4), path) as figure:
        grid = figure.subplots(down, ACROSS, sharey=True, squeeze=False).flat
        for axes, row in zip(grid, rows, strict=False):
            _panel(axes, row, report)
        for axes in grid[len(rows) :]:
            axes.set_axis_off()
        figure.supylabel("safe continuations", fontsize=9)
        figure.supxlabel("tokens of the reasoning; line: first cue, triangles: turns, hollow: at the end", fontsize=9)


def effects(report: RankReport, path: Path) -> None:
    """Reasoning harm and refusals after each sentence, by place, with intervals."""
    rows = report.sentences
    with _canvas((9.0, 0.45 * len(rows) + 1.2), path) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for index, where in enumerate(PLACES):
            found = [(at, row.effects[where]) for at, row in enumerate(rows) if where in row.effects]
            places = [at + (index - 1) * 0.22 for at, _ in found]
            _dots(left, places, [effect.reasoning_harm for _, effect in found], where, WARM)
            _dots(right, places, [effect.refusal for _, effect in found], where, COOL)
        for axes, name in ((left, "reasoning harm after it"), (right, "refusals after it")):
            axes.set_title(name, fontsize=9)
            axes.set_xlim(-0.02, 1.02)
            axes.grid(axis="x", color=GRID, linewidth=0.6)
            axes.legend(fontsize=7, frameon=False, loc="best")
        left.set_yticks(range(len(rows)), [f"{row.id} ({row.kind})" for row in rows])
        left.invert_yaxis()


@contextlib.contextmanager
def _canvas(size: tuple[float, float], path: Path) -> Iterator[Figure]:
    """A figure of so many inches, written whole or not at all; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(scratch, format="svg", metadata={"Date": None})
    scratch.replace(path)


def _panel(axes: Axes, row: ReasoningReport, report: CsrReport) -> None:
    tokens = [point.token for point in row.points]
    rates = [point.ratio for point in row.points]
    axes.plot(tokens, [rate.rate for rate in rates], color=INK, linewidth=1, marker=".", markersize=4)
    axes.vlines(tokens, [rate.lo for rate in rates], [rate.hi for rate in rates], color=MUTED, linewidth=0.8)
    for height in (report.rule.mu, report.rule.eta):
        axes.axhline(height, color=GRID, linewidth=0.8)
    if row.cue_token is not None:
        axes.axvline(row.cue_token, color=WARM, linewidth=0.8, linestyle=":")
    marks: tuple[tuple[Kind, str, str], ...] = (("unsafe", WARM, "v"), ("safe", COOL, "^"))
    for kind, colour, mark in marks:
        turn = row.turns.get(kind)
        if turn is not None:
            fill = "none" if turn.at_end else colour
            axes.plot([turn.token], [turn.ratio.rate], mark, color=colour, markerfacecolor=fill, markersize=8)
    axes.set_ylim(-0.06, 1.06)
    axes.set_title(_short(row.request), fontsize=7, loc="left")


def _dots(axes: Axes, places: Sequence[float], rates: Sequence[Rate], where: Where, colour: str) -> None:
    axes.hlines(places, [rate.lo for rate in rates], [rate.hi for rate in rates], color=MUTED, linewidth=0.8)
    axes.plot([rate.rate for rate in rates], places, _MARKS[where], color=colour, markersize=4, label=where)


def _short(text: str, most: int = 44) -> str:
    flat = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
    return flat if len(flat) <= most else f"{flat[: most - 3]}..."
