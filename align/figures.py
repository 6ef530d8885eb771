"""Figures as a reader sees them: a rate with its interval and n, and tables of such figures."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from classifiers.stats import Rate

Unit = Literal["percent", "points", "per 1,000", "plain"]
# Left to right, or a rate read back from JSON would also pass as a mapping of floats.
Value = Annotated[Rate | str | float, Field(union_mode="left_to_right")]


class Grid(BaseModel):
    """One more table of a report: a cell is a rate, a number, or a text (empty: nothing was measured)."""

    model_config = ConfigDict(extra="forbid")

    title: str
    note: str = ""
    head: str
    """Of the first column, which names the rows."""
    columns: dict[str, Unit]
    rows: dict[str, list[Value]]

    @model_validator(mode="after")
    def _rows_fill_the_columns(self) -> Grid:
        if bad := [name for name, row in self.rows.items() if len(row) != len(self.columns)]:
            raise ValueError(f"row {bad[0]} has {len(self.rows[bad[0]])} cells; wanted {len(self.columns)}")
        return self

    def lines(self) -> dict[str, list[tuple[str, str, str]]]:
        """The cells of each row as (point, interval, n)."""
        return {
            name: [
                parts(cell, unit) if isinstance(cell, Rate) else (value_text(cell), "", "")
                for cell, unit in zip(row, self.columns.values(), strict=True)
            ]
            for name, row in self.rows.items()
        }  # fmt: skip


def unit_of(name: str) -> Unit:
    """How a figure of this name is shown: `... points` in points, the rest as a percentage."""
    return "points" if name.endswith("points") else "percent"


def parts(rate: Rate, unit: Unit) -> tuple[str, str, str]:
    """The point, the interval (empty where there is none) and the n of one cell."""
    n = f"n={rate.n}"
    if rate.n == 0:
        return "no cases", "", n
    if not all(map(math.isfinite, (rate.rate, rate.lo, rate.hi))):
        return "undefined", "", n
    if unit == "per 1,000":
        return f"{round(rate.rate)}", f"[{round(rate.lo)}, {round(rate.hi)}]", n
    if unit == "plain":
        return value_text(rate.rate), f"[{value_text(rate.lo)}, {value_text(rate.hi)}]", n
    interval = f"[{round(100 * rate.lo)}, {round(100 * rate.hi)}]"
    # Adding zero turns -0.0 into 0.0.
    point = round(100 * rate.rate, 1) + 0.0
    return (f"{point:.1f} %" if unit == "percent" else f"{point:+.1f} points"), interval, n


def show(figure: Rate | float, unit: Unit = "percent") -> str:
    """One cell on one line, such as `42.1 % [34, 50] n=144`."""
    return " ".join(filter(None, parts(figure, unit))) if isinstance(figure, Rate) else value_text(figure)


def value_text(value: Rate | str | float) -> str:
    """A figure of the speed or agreement lists."""
    if isinstance(value, float | int):
        return "undefined" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
