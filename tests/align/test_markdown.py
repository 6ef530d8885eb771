"""A report as Markdown: every figure with its interval and n, and no text that could break out of its cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.markdown import load_report, markdown
from align.report import Goal, write_report
from guard.errors import UserError
from tests.align.reports import RAW, hostile_report, sample


def test_tables_hold_every_figure_with_interval_and_n(tmp_path: Path) -> None:
    write_report(sample(), tmp_path)
    text = markdown(load_report(tmp_path / "report.json"))
    judged, arms, controls, goals = text.strip().split("\n\n")
    assert judged == "Judge `judge-1`, detector `detector-1`, seeds [0, 1]."
    lines = arms.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| base+guard", "| other"]
    assert lines[2].startswith(
        "| base | 85.4 % [79, 90] n=144 | 84.0 % [77, 89] n=144 | 2.5 % [1, 7] n=120 | no guard |"
    )
    assert controls.splitlines()[3] == ("| a trigger in its place | 10.0 % [4, 21] n=50 | 90.0 % [79, 96] n=50 |")
    assert goals.splitlines()[2:] == [
        "| met | drop | >= 70 % | 78.9 % [71, 86] n=144 |".replace(">", "&gt;"),
        "| **missed** | minutes | <= 20 | 21.5 |".replace("<", "&lt;"),
    ]


def test_hostile_text_stays_in_its_cell() -> None:
    text = markdown(hostile_report())
    assert [raw for raw in RAW if raw in text] == []
    forged = markdown(sample(goals=[Goal(name="a | b\n| c |", wanted="1", got=1.0, met=False)]))
    assert forged.splitlines()[-1] == "| **missed** | a \\| b \\| c \\| | 1 | 1 |"


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), ("{}", "malformed at title")])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_report(path)
