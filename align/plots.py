"""The report's figures as SVG to stand inside a page: no fonts, no addresses, colours from the page's variables.

Every bar carries the id `<figure>-bar-<series>-<group>`, and every figure a title and its numbers as a description.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from align.controls import Control
    from align.evaluate import ArmReport
    from classifiers.stats import Rate

INK, MUTED, GRID = "#1c1e21", "#5c6066", "#d9dbdf"
# Okabe and Ito's vermillion and blue, which colour-blind readers tell apart; a pale fill with an outline is the third
# and fourth kind, so that no two kinds of bar differ by hue alone.
WARM, WARM_PALE, COOL, COOL_PALE = "#d55e00", "#f9d9c3", "#0072b2", "#cfe4f2"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "rule",
    WARM: "warm", WARM_PALE: "warm-pale", COOL: "cool", COOL_PALE: "cool-pale",
}  # fmt: skip
#: Inches, also on the left for the ticks' labels.
HEIGHT, MARGIN = 3.2, 0.55
LABEL_CHARS = 20
_LOOK = {"svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.edgecolor": MUTED, "text.parse_math": False}


@dataclass(frozen=True)
class Series:
    """One kind of bar: a rate for each group."""

    name: str
    fill: str
    edge: str
    rates: Sequence[Rate]


@dataclass(frozen=True)
class Chart:
    """Groups of bars; rates are multiplied by `scale` and axis and labels are in `unit`."""

    name: str
    title: str
    groups: Sequence[str]
    series: Sequence[Series]
    top: float
    scale: float
    unit: str
    width: float


def arms(rows: Mapping[str, ArmReport]) -> str | None:
    """Reasoning harm, answer harm and benign refusals by arm; None without arms."""
    if not rows:
        return None
    series = [
        Series("Reasoning harm", WARM, WARM, [r.reasoning_harm for r in rows.values()]),
        Series("Answer harm", WARM_PALE, WARM, [r.answer_harm for r in rows.values()]),
        Series("Benign refusals", COOL, COOL, [r.benign_refusal for r in rows.values()]),
    ]
    title = "Harm and benign refusals by arm"
    return draw(Chart("arms", title, list(rows), series, 100, 100, "%", max(6.0, 2.0 * len(rows))))


def interventions(rows: Mapping[str, ArmReport]) -> str | None:
    """Interventions per 1,000 requests before and after aligning; None without a guarded arm."""
    both = (("base+guard", "Before aligning", COOL), ("aligned+guard", "After aligning", COOL_PALE))
    series = [
        Series(name, fill, COOL, [rows[arm].interventions_per_1000, rows[arm].benign_interventions_per_1000])
        for arm, name, fill in both
        if arm in rows
    ]
    if not series:
        return None
    groups = ["harmful requests", "benign requests"]
    title = "Interventions per 1,000 requests, before and after aligning"
    return draw(Chart("interventions", title, groups, series, 1000, 1, "", 5.0))


def controls(rows: Mapping[str, Control]) -> str | None:
    """Reasoning harm and refusals after a cue, a trigger and a neutral sentence; None without controls."""
    if not rows:
        return None
    series = [
        Series("Reasoning harm", WARM, WARM, [r.reasoning_harm for r in rows.values()]),
        Series("Refusals", COOL, COOL, [r.refusal for r in rows.values()]),
    ]
    groups = [f"after {name}" for name in rows]
    title = "What followed a cue, a trigger, a neutral sentence"
    return draw(Chart("controls", title, groups, series, 100, 100, "%", 5.0))


def draw(chart: Chart) -> str:
    """The chart as one `<svg>` element."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(chart.width, HEIGHT))
        figure.patch.set_visible(False)
        box = (MARGIN / chart.width, 0.08, 1 - (MARGIN + 0.05) / chart.width, 0.78)
        axes = figure.add_axes(box, facecolor="none")
        for index in range(len(chart.series)):
            _bars(axes, chart, index)
        _frame(figure, axes, chart)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return _embed(target.getvalue(), chart)


def _bars(axes: Axes, chart: Chart, index: int) -> None:
    series = chart.series[index]
    width = 0.78 / len(chart.series)
    for group, rate in enumerate(series.rates):
        at = group + (index - (len(chart.series) - 1) / 2) * width
        known = rate.n > 0 and all(map(math.isfinite, (rate.rate, rate.lo, rate.hi)))
        if not known:
            _label(axes, "no data", at, 0, MUTED)
            continue
        point, lo, hi = (chart.scale * value for value in (rate.rate, rate.lo, rate.hi))
        (bar,) = axes.bar(at, point, 0.88 * width, facecolor=series.fill, edgecolor=series.edge, linewidth=1)
        bar.set_gid(f"bar-{index}-{group}")
        (whisker,) = axes.plot([at, at], [lo, hi], color=INK, linewidth=1.3, solid_capstyle="butt")
        whisker.set_gid(f"interval-{index}-{group}")
        _label(axes, f"{point:.0f}", at, max(hi, point), INK)


def _label(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(text, (x, y), (0, 3), textcoords="offset points", ha="center", fontsize=9, color=colour)


def _frame(figure: Figure, axes: Axes, chart: Chart) -> None:
    from matplotlib.patches import Patch

    axes.set_xticks(range(len(chart.groups)), [_short(name.replace("+", " + ")) for name in chart.groups], color=INK)
    ticks = [chart.top * share for share in (0, 0.25, 0.5, 0.75, 1)]
    axes.set_yticks(ticks, [f"{tick:,.0f} {chart.unit}".strip() for tick in ticks], color=MUTED, fontsize=9)
    axes.set_xlim(-0.5, len(chart.groups) - 0.5)
    axes.set_ylim(0, 1.08 * chart.top)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)
    handles = [Patch(facecolor=s.fill, edgecolor=s.edge, label=s.name) for s in chart.series]
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    figure.legend(handles=handles, ncols=3, frameon=False, handlelength=1.1, fontsize=9.5, **place)


def _short(label: str) -> str:
    return label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 3]}..."


def describe(chart: Chart) -> str:
    """The chart's numbers in words, for readers who don't see it."""
    lines = []
    for series in chart.series:
        figures = (
            f"{group} {chart.scale * r.rate:.0f} ({chart.scale * r.lo:.0f} to {chart.scale * r.hi:.0f}, n={r.n})"
            for group, r in zip(chart.groups, series.rates, strict=True)
        )
        lines.append(f"{series.name}{f' in {chart.unit}' if chart.unit else ''}: {', '.join(figures)}.")
    return " ".join(lines)


def _embed(svg: str, chart: Chart) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.S)
    # The page's font, whichever it is.
    svg = re.sub(r"font-family: [^;\"]+; ", "", svg)
    # Names are per document and a page holds several figures.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]+"', svg)
    words = f"<title>{html.escape(chart.title)}</title><desc>{html.escape(describe(chart))}</desc>"
    head = f'<svg role="img" aria-label="{html.escape(chart.title)}" {box.group() if box else ""}>'
    return re.sub(r"<svg[^>]*>", lambda _: head + words, svg, count=1)
