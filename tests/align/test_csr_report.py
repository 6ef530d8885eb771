"""What `csr` reports: shares, correlation, cost, the table and the plots."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from align.csr_plots import curves, effects
from align.csr_report import print_report, read_report, summarise
from align.csr_run import every_token
from align.trigger_rank import Effect, Ranked, RankReport
from classifiers.stats import Rate
from guard.errors import UserError
from tests.align.csr_reports import report, row, turn

SVG = "{http://www.w3.org/2000/svg}"


def test_the_summary_counts_what_turned() -> None:
    start = turn("", step=None, before=None)
    rows = [
        row("calm", {"safe": start}),
        row("turned", {"safe": turn("a b c")}, cue=1, cue_token=12),
        row("safe, no turning", {}),
        row("unsafe", {"unsafe": turn("d e f")}, safe=False, cue=2, cue_token=20, generated=300),
        row("unsafe from the start", {"unsafe": start}, safe=False, cue=1, cue_token=9),
        row("calm and short", {"safe": turn("", step=None, before=None, at_end=True)}),
    ]
    found = summarise(rows)
    assert found.safe_start == Rate.of(2, 6)
    assert found.safe_turn == Rate.of(1, 2)
    assert found.unsafe_turn == Rate.of(1, 2)
    assert found.safe_end == found.unsafe_end == Rate.of(0, 2)
    assert found.cue_correlation is None, "one reasoning with a cue and an unsafe turning point"
    assert (found.generated, found.every_token) == (800, 24_000)
    assert found.fewer_tokens is not None
    assert found.fewer_tokens.rate == pytest.approx(24_000 / 800)
    assert summarise([]).fewer_tokens is None


def test_a_turn_at_the_end_is_no_turning_point() -> None:
    late = turn("a b c", at_end=True)
    rows = [
        row("safe", {"safe": late}),
        *(row(str(at), {"unsafe": late}, safe=False, cue=1, cue_token=at) for at in range(3)),
    ]
    found = summarise(rows)
    assert (found.safe_turn, found.safe_end) == (Rate.of(0, 1), Rate.of(1, 1))
    assert (found.unsafe_turn, found.unsafe_end) == (Rate.of(0, 3), Rate.of(3, 3))
    assert found.cue_correlation is None
    target = io.StringIO()
    print_report(report(*rows), Console(file=target, width=200))
    assert "2 (at the end)" in target.getvalue()
    assert "safe reasonings that turn less than 15 tokens before their end: 1.000" in target.getvalue()


def test_cues_and_turning_points_correlate() -> None:
    # A cue in the first step counts like any other.
    rows = [
        row(str(at), {"unsafe": turn("x").model_copy(update={"token": 3 * at + 9})}, cue=step, cue_token=at)
        for step, at in enumerate((0, 9, 16, 25))
    ]
    found = summarise(rows).cue_correlation
    assert found is not None
    assert found.rate == pytest.approx(1.0)
    assert found.n == 4


def test_the_tokens_of_every_token_are_interpolated() -> None:
    # After 1, 2, 3, 4 tokens: 30, 20, 10, 10.
    assert every_token({0: 40.0, 3: 10.0}, 4, 32) == 32 * 70
    assert every_token({}, 4, 32) == 0


def test_the_table_shows_hostile_text_as_text() -> None:
    target = io.StringIO()
    hostile = row("x", {"safe": turn("[red]x")}, request="[bold]\x1b[31mhow")
    print_report(report(hostile), Console(file=target, width=200))
    assert "[bold][31mhow" in target.getvalue()
    assert "\x1b" not in target.getvalue()


def test_another_file_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "csr.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_report(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is no CSR report"):
        read_report(path)
    path.write_text(report().model_dump_json())
    assert read_report(path) == report()


def test_curves_are_drawn_whatever_the_requests_hold(tmp_path: Path) -> None:
    turns = [turn("a", at_end=i > 2) for i in range(5)]
    rows = [
        row(f"{i}", {"safe": each}, request="$x_{<script>$ \x00 & how", cue_token=9) for i, each in enumerate(turns)
    ]
    curves(report(*rows), tmp_path / "csr.svg")
    curves(report(*rows), tmp_path / "csr2.svg")
    page = ET.parse(tmp_path / "csr.svg").getroot()
    titles = [text for text in ("".join(node.itertext()) for node in page.iter(f"{SVG}text")) if "script" in text]
    assert titles == ["$x_{<script>$ & how"] * 5
    curves(report(), tmp_path / "empty.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csr.svg", "csr2.svg", "empty.svg"]


def test_effects_are_drawn_for_each_sentence(tmp_path: Path) -> None:
    rate = Rate.of(3, 8)
    effect = Effect(
        refusal=rate, reasoning_harm=rate, answer_harm=rate, refusal_minus_neutral=rate, harm_minus_neutral=rate
    )
    sentences = [
        Ranked(id="a", text="A b c.", kind="pool", effects={"in its place": effect, "later": effect}),
        Ranked(id="neutral", text="N.", kind="control", effects={"in its place": effect}),
    ]
    ranks = RankReport(model="m", judge="j", detector="d", seed=0, without_cue=0, sentences=sentences)
    effects(ranks, tmp_path / "triggers.svg")
    page = ET.parse(tmp_path / "triggers.svg").getroot()
    texts = {"".join(node.itertext()) for node in page.iter(f"{SVG}text")}
    assert {"a (pool)", "neutral (control)", "in its place", "later"} <= texts
