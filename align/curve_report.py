"""What `align curve` writes: `curve.json`, the tables and the picture of `curve.md`, and the chosen recipe."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.curve_choice import ABOVE, ALARMING, EITHER, ORDINARY, SOUND, UNSETTLED, CurveReport
from align.evaluate import ArmReport
from align.figures import Grid, show
from align.markdown import grid_table
from align.plots import COOL, COOL_PALE, GRID, INK, MUTED, WARM
from align.report import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from classifiers.stats import Rate

LEVELS = {
    "Harm in either place": "any_harm", "Reasoning harm": "reasoning_harm", "Answer harm": "answer_harm",
    "Harmful requests refused": "harmful_refusal", "Neither refused nor harmful": "unsettled",
    "Ordinary refused": "ordinary_refusal", "Alarming refused": "alarming_refusal",
    "Alarming answered without harm": "alarming_harmless", "Sound benign replies": "quality",
}  # fmt: skip
NOTES = """\
Harm in either place: the judge calls the reasoning or the answer harmful. Drops are relative, other changes are points
of rate, paired by request; intervals are 95 % and take the wordings and seeds of one topic together. Each point was
trained once a seed: what further seeds would change is not inside the intervals. The chosen point's figures are the
best of several and therefore a little too good: what the recipe is worth, a report says on other requests. A recipe
that raises "neither refused nor harmful" may have moved harm into a tone that the judge does not know.
"""
_LOOK = {"font.size": 9, "text.color": INK, "axes.edgecolor": MUTED, "text.parse_math": False}


def write_curve(report: CurveReport, out: Path) -> None:
    """Writes all files of the curve into `out`, each whole or not at all."""
    _write(out / "curve.json", report.model_dump_json(indent=1) + "\n")
    picture(report, out / "curve.png")
    _write(out / "curve.md", markdown(report))
    if report.chosen is None:
        (out / "chosen.yaml").unlink(missing_ok=True)
    else:
        _write(out / "chosen.yaml", recipe(report, report.chosen))


def markdown(report: CurveReport) -> str:
    """The page: what was measured, what was chosen, tables and picture."""
    asked = ", ".join(f"{n} {label}" for label, n in report.counts.items())
    several = len(report.seeds) > 1
    head = (
        f"Model `{visible(report.model)}`, judge `{report.judge}`, seed{'s' * several} "
        f"{', '.join(map(str, report.seeds))}. Requests: {visible(report.requests)} ({asked}; {report.topics} topics"
        f"{', each asked once a seed' * several}). Made by `{visible(report.command)}`."
    )
    parts = ["# Curve", head, verdict(report), "![Harm against benign refusals](curve.png)"]
    return "\n\n".join([*parts, *map(grid_table, grids(report)), NOTES])


def verdict(report: CurveReport) -> str:
    """What was chosen, in words."""
    settings = report.settings
    limits = (
        f"refusals of alarming requests up by at most {100 * settings.max_refusals:g} points, sound benign replies "
        f"down by at most {100 * settings.max_quality_loss:g}, replies to harmful requests that neither refuse nor are "
        f"judged harmful up by at most {100 * settings.max_unsettled:g}"
    )
    if report.chosen is None:
        return f"Chosen: none. No point is within the limits ({limits})."
    numbered, chosen = _numbered(report), report.points[report.chosen]
    said = (
        f"Chosen: {chosen.label}. Of the points within the limits ({limits}) it harms least in reasoning or "
        f"answer: {show(chosen.arm.any_harm)}."
    )
    near = "; ".join(numbered[name] for name in report.near)
    return f"{said} Not told apart from it by that figure: {near}." if near else said


def grids(report: CurveReport) -> list[Grid]:
    """Levels, changes against the base model, and what was trained."""
    rows = _numbered(report)
    drops = {"Harm in either place": EITHER, "Reasoning harm": "reasoning harm, relative drop"}
    drops |= {"Answer harm": "answer harm, relative drop"}
    moves = {
        "Neither refused nor harmful": UNSETTLED,
        "Ordinary refused": ORDINARY,
        "Alarming refused": ALARMING,
        "Sound benign replies": SOUND,
    }
    moves |= {"Harm above the chosen": ABOVE}
    return [
        Grid(
            title="Points", head="Point", columns=dict.fromkeys(LEVELS, "percent"),
            rows={"base": _levels(report.base)} | {rows[n]: _levels(p.arm) for n, p in report.points.items()},
        ),
        Grid(
            title="Against the base model", head="Point",
            columns={**{f"{name}, drop": "percent" for name in drops}, **dict.fromkeys(moves, "points")},
            rows={
                rows[n]: [p.changes.get(figure, "") for figure in (*drops.values(), *moves.values())]
                for n, p in report.points.items()
            },
        ),
        Grid(
            title="Training", head="Point", columns=dict.fromkeys(("Pairs", "Benign", "Tokens", "Seconds"), "plain"),
            rows={
                f"{rows[n]}{f', seed {seed}' * (len(report.seeds) > 1)}": [
                    str(t.pairs), str(t.benign), f"{t.tokens:,}", f"{t.seconds:.0f}"
                ]
                for n, p in report.points.items()
                for seed, t in zip(report.seeds, p.training, strict=True)
            },
        ),
    ]  # fmt: skip


def recipe(report: CurveReport, name: str) -> str:
    """A stages file: the stages before, and one point. The seed is the run's that it is used in."""
    point = report.points[name]
    head = [
        f"Chosen by `align curve` with {report.judge}: {point.label}.",
        f"Harm in reasoning or answer {show(point.arm.any_harm)}, before {show(report.base.any_harm)};",
        f"alarming requests refused {show(point.changes[ALARMING], 'points')}, "
        f"sound benign replies {show(point.changes[SOUND], 'points')};",
        f"harmful requests refused {show(point.arm.harmful_refusal)}, "
        f"replies that do neither {show(point.changes[UNSETTLED], 'points')}.",
        "Use: cli.py align --traces traces/ --model M --out runs/next --stages THIS_FILE",
    ]
    stages = [s.model_dump(mode="json", exclude={"seed"}) for s in (*report.before, point.training[0].settings)]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(stages, sort_keys=False)


def print_curve(report: CurveReport, console: Console) -> None:
    """The tables and what was chosen."""
    for grid in grids(report):
        table = Table(grid.head, title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for column in grid.columns:
            table.add_column(column, justify="right")
        for name, cells in grid.lines().items():
            table.add_row(Text(name), *(Text("\n".join(filter(None, cell))) for cell in cells))
        console.print(table)
        console.print()
    console.print(Text(verdict(report), style="bold"))


def picture(report: CurveReport, path: Path) -> None:
    """Reasoning harm against benign refusals, and what the choice is made on: harm in either place against refusals
    of alarming requests, with the limit. Points are numbered, lines are 95 % intervals."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scratch = _scratch(path)
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, report, ("benign_refusal", "refused of all benign requests"), ("reasoning_harm", "reasoning harm"))
        _panel(
            right, report, ("alarming_refusal", "refused of alarming requests"), ("any_harm", "harm in either place")
        )
        limit = report.base.alarming_refusal.rate + report.settings.max_refusals
        right.axvline(100 * limit, color=MUTED, linewidth=0.9, linestyle=":")
        marks = [Line2D([], [], linestyle="", marker="s", color=INK, label="base")]
        for name, text in _numbered(report).items():
            marks.append(Line2D([], [], linestyle="", marker="o", color=_colour(report, name), label=text))
        marks.append(Line2D([], [], linestyle=":", color=MUTED, label="limit on refusals"))
        figure.legend(handles=marks, loc="outside right upper", frameon=False)
        figure.savefig(scratch, format="png", dpi=130, metadata={"Software": None})
    scratch.replace(path)


def _panel(axes: Axes, report: CurveReport, x: tuple[str, str], y: tuple[str, str]) -> None:
    places = [("base", report.base, INK, "s")]
    for number, (name, point) in enumerate(report.points.items(), 1):
        places.append((str(number), point.arm, _colour(report, name), "o"))
    for text, arm, colour, mark in places:
        across, up = getattr(arm, x[0]), getattr(arm, y[0])
        axes.errorbar(
            100 * across.rate, 100 * up.rate, xerr=_whiskers(across), yerr=_whiskers(up), fmt=mark, color=colour,
            ecolor=COOL_PALE if colour == COOL else colour, elinewidth=0.8, markersize=5,
        )  # fmt: skip
        axes.annotate(
            text, (100 * across.rate, 100 * up.rate), (4, 4), textcoords="offset points", fontweight="bold",
            color=colour,
        )  # fmt: skip
    axes.set_xlabel(f"{x[1]}, %")
    axes.set_ylabel(f"{y[1]}, %")
    axes.set_xlim(left=-1)
    axes.set_ylim(-2, 102)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(report: CurveReport, name: str) -> str:
    return WARM if name == report.chosen else COOL


def _whiskers(rate: Rate) -> list[list[float]]:
    """How far the interval reaches below and above the point; nothing where it is undefined."""
    ends = (rate.rate - rate.lo, rate.hi - rate.rate)
    return [[100 * max(0.0, end) if math.isfinite(end) else 0.0] for end in ends]


def _levels(arm: ArmReport) -> list[Rate | str | float]:
    return [getattr(arm, field) for field in LEVELS.values()]


def _numbered(report: CurveReport) -> dict[str, str]:
    """Labels with the numbers that the picture has; the chosen one says so."""
    return {
        name: f"{number}: {point.label}{' (chosen)' if name == report.chosen else ''}"
        for number, (name, point) in enumerate(report.points.items(), 1)
    }


def _scratch(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
