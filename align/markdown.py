"""A report as Markdown tables: arms, controls, goals. What the README shows is made by `cli.py align table`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from pydantic import ValidationError

from align.figures import Grid, show, unit_of
from align.report import COLUMNS, CONTROLS, Report, cells, cut, ordered, visible
from guard.errors import UserError


def load_report(path: Path) -> Report:
    """Reads a `report.json`; a missing or malformed file is a UserError."""
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}", got=error.strerror or str(error), wanted="the report.json of an align run"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is malformed at {key}", got=first["msg"], wanted="a report.json") from None


def markdown(report: Report) -> str:
    """The report's figures, each with its interval and n, and who judged and who intervened."""
    judged = (
        f"Judge `{_cell(report.judge.version)}`, detector `{_cell(report.detector.version)}`, seeds {report.seeds}."
    )
    arms = _table(
        ("arm", *(title for title, *_ in COLUMNS)),
        ([name, *(" ".join(filter(None, cell)) for cell in cells(name, arm, COLUMNS))]
         for name, arm in ordered(report.arms).items()),
    )  # fmt: skip
    controls = _table(
        ("harmful reasoning, cut before its first cue and continued after", "Reasoning harm", "Refusals"),
        ([CONTROLS.get(name, name), show(row.reasoning_harm), show(row.refusal)]
         for name, row in report.controls.items()),
    )  # fmt: skip
    goals = _table(
        ("goal", "figure", "wanted", "got"),
        (["met" if goal.met else "**missed**", goal.name, goal.wanted, show(goal.got, unit_of(goal.name))]
         for goal in report.goals),
    )  # fmt: skip
    return "\n\n".join((judged, arms, controls, goals, *map(grid_table, report.grids.values()))) + "\n"


def grid_table(grid: Grid) -> str:
    """One further table under its title."""
    rows = ([name, *(" ".join(filter(None, one)) for one in found)] for name, found in grid.lines().items())
    return f"**{_cell(grid.title)}**\n\n" + _table((grid.head, *grid.columns), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return escape(visible(cut(text, 200)), quote=False).replace("\n", " ").replace("|", "\\|")
