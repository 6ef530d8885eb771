"""The paper's tables in shape, from outcomes whose figures are known by hand; its numbers only beside its models."""

from __future__ import annotations

import pytest

from align.figures import Grid
from align.paper import numbers_for, paper_grids
from align.study import SeedRun
from classifiers.stats import Rate
from tests.align.outcomes import outcome

JBB, SR = "JailbreakBench", "StrongReject"
LLAMA = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def run() -> SeedRun:
    """Base: JBB 3 of 4 reasonings and 2 answers, StrongReject 1 of 2 and 0; aligned: none but one answer."""
    base = [
        outcome("j0", thought=True, said=True, benchmark=JBB), outcome("j1", thought=True, said=True, benchmark=JBB),
        outcome("j2", thought=True, benchmark=JBB), outcome("j3", benchmark=JBB),
        outcome("s0", thought=True, benchmark=SR), outcome("s1", benchmark=SR),
        outcome("x0", "alarming", benchmark="XsTest"), outcome("x1", "alarming", refuses=True, benchmark="XsTest"),
        outcome("b0", "benign", refuses=True),
    ]  # fmt: skip
    aligned = [
        outcome(o.request.topic, o.request.label, benchmark=o.request.benchmark, said=o.request.topic == "s1")
        for o in base
    ]
    rounds = [base[:3], [outcome("j0", thought=True), outcome("j1"), outcome("j2")]]
    return SeedRun([0], {"base": base, "aligned": aligned, "sft": aligned}, {}, rounds=rounds)


def rates(grid: Grid, row: str) -> dict[str, tuple[float, int]]:
    cells = zip(grid.columns, grid.rows[row], strict=True)
    return {name: (cell.rate, cell.n) for name, cell in cells if isinstance(cell, Rate)}


def test_table_2_by_hand() -> None:
    found = paper_grids(run(), "demo", {"base": {"gsm8k": Rate.of(1, 4)}})
    table = found["paper_table_2"]
    assert rates(table, "base") == {
        f"{JBB} R": (0.75, 4), f"{JBB} A": (0.5, 4), f"{SR} R": (0.5, 2), f"{SR} A": (0.0, 2),
        "Average R": (0.625, 6), "Average A": (0.25, 6), "gsm8k": (0.25, 4), "Alarming complied": (0.5, 2),
    }  # fmt: skip
    assert rates(table, "aligned")["Average A"] == (0.25, 6)
    assert list(table.rows) == ["base", "aligned", "sft"]
    assert found["paper_table_3"].columns == dict.fromkeys(("Reasoning harm", "Answer harm", "Mean of both"), "percent")
    assert rates(found["paper_table_3"], "sft")["Mean of both"] == (pytest.approx(1 / 12), 6)
    assert rates(found["paper_figure_3"], "harmful reasoning, harmless answer")["base"] == (pytest.approx(2 / 6), 6)
    assert rates(found["paper_figure_6"], "0") == {"Reasoning harm": (1.0, 3)}
    assert rates(found["paper_figure_6"], "1") == {"Reasoning harm": (pytest.approx(1 / 3), 3)}


def test_the_papers_numbers_stand_only_beside_its_models() -> None:
    assert numbers_for("/models/smollm2") == {}
    table = paper_grids(run(), LLAMA, {})["paper_table_2"]
    at = {name: i for i, name in enumerate(table.columns)}
    paper = {name: row for name, row in table.rows.items() if name.endswith("(paper)")}
    assert len(paper) == 7
    row = paper["aligned (paper)"]
    shown = [row[at[c]] for c in (f"{JBB} R", f"{SR} A", "Average R", "Alarming complied", "Tasks solved")]
    assert shown == ["5.7 %", "10.9 %", "15.3 %", "80.0 %", ""]
    assert paper["SafeKey (paper)"][at[f"{JBB} R"]] == ""
    third = paper_grids(run(), LLAMA, {})["paper_table_3"]
    assert [third.rows[arm][-1] for arm in ("sft", "aligned")] == ["47.4 / 37.3 / 42.3", "11.2 / 10.6 / 10.9"]
    joint = paper_grids(run(), "Qwen/Qwen3-8B/", {})["paper_figure_3"]
    assert [row[-1] for row in joint.rows.values()] == ["28.2", "3.7", "", "68.0"]
    assert "Paper, %" not in paper_grids(run(), "demo", {})["paper_figure_3"].columns
