"""Tables beyond the arms: their cells, their way into the page, the Markdown and the JSON."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align.figures import Grid, parts, show
from align.markdown import load_report, markdown
from align.report import render, write_report
from classifiers.stats import Rate
from tests.align.reports import HOSTILE, RAW, SHOWN_HOSTILE, sample

GRID = Grid(
    title="Tasks", note="A note on them.", head="Arm",
    columns={"Solved": "percent", "Change": "points", "Kappa": "plain", "Unjudged": "plain", "Paper": "plain"},
    rows={
        "base": [Rate.of(3, 4), "", Rate(rate=0.8125, lo=0.5, hi=1.0, n=40), 3.0, "69.0 %"],
        "aligned": [Rate.of(0, 0), Rate(rate=-0.02, lo=-0.1, hi=0.05, n=4), Rate.of(1, 2), math.nan, ""],
    },
)  # fmt: skip


def test_cells_by_unit() -> None:
    assert parts(Rate(rate=12.345, lo=0.0, hi=130.0, n=7), "plain") == ("12.3", "[0, 130]", "n=7")
    assert show(Rate.of(3, 4)) == "75.0 % [30, 95] n=4"
    assert GRID.lines() == {
        "base": [
            ("75.0 %", "[30, 95]", "n=4"), ("", "", ""), ("0.812", "[0.5, 1]", "n=40"), ("3", "", ""),
            ("69.0 %", "", ""),
        ],
        "aligned": [
            ("no cases", "", "n=0"), ("-2.0 points", "[-10, 5]", "n=4"), ("0.5", "[0.0945, 0.905]", "n=2"),
            ("undefined", "", ""), ("", "", ""),
        ],
    }  # fmt: skip


def test_a_row_that_does_not_fill_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="row base has 1 cells; wanted 2"):
        Grid(title="t", head="h", columns={"a": "plain", "b": "plain"}, rows={"base": ["x"]})


def test_grids_survive_the_round_trip_and_stand_in_page_and_markdown(tmp_path: Path) -> None:
    write_report(sample(grids={"tasks": GRID}), tmp_path)
    back = load_report(tmp_path / "report.json")
    assert back.grids["tasks"].rows["base"] == GRID.rows["base"]
    assert math.isnan(back.grids["tasks"].rows["aligned"][3])  # type: ignore[arg-type]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h3>Tasks</h3>" in page
    assert '<span class="point">0.812</span><span class="sub">[0.5, 1] n=40</span>' in page
    text = markdown(back)
    title, table = text.strip().split("\n\n")[-2:]
    assert title == "**Tasks**"
    assert table.splitlines()[2] == "| base | 75.0 % [30, 95] n=4 |  | 0.812 [0.5, 1] n=40 | 3 | 69.0 % |"


def test_hostile_names_stay_text_in_a_grid() -> None:
    report = sample(
        grids={HOSTILE: Grid(title=HOSTILE, note=HOSTILE, head=HOSTILE, columns={HOSTILE: "plain"},
                             rows={HOSTILE: [HOSTILE]})}
    )  # fmt: skip
    page = render(report)
    assert page.count(SHOWN_HOSTILE) == 6
    assert [raw for raw in RAW if raw in page] == []
    assert [raw for raw in RAW if raw in markdown(report)] == []
