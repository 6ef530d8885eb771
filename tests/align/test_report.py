"""The report: figures survive the round trip, hostile text stays text, the page stands alone."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from align import plots
from align.controls import Control
from align.figures import Unit, show, value_text
from align.report import (
    SHOWN_CHARS,
    Goal,
    Report,
    Span,
    Transcript,
    TranscriptArm,
    cut,
    print_table,
    render,
    segments,
    visible,
    write_report,
)
from classifiers.stats import Rate
from tests.align.reports import RAW, SHOWN_HOSTILE, arm, hostile_report, sample, thousand

VOID = {"meta", "br", "img", "link", "hr", "input"}


def printed(report: Report, width: int) -> str:
    target = io.StringIO()
    print_table(report, Console(file=target, width=width, force_terminal=False))
    return target.getvalue()


def test_json_round_trip_keeps_every_figure(tmp_path: Path) -> None:
    report = sample()
    page = write_report(report, tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    text = (tmp_path / "run" / "report.json").read_text(encoding="utf-8")
    assert Report.model_validate_json(text) == report
    raw = json.loads(text)
    assert raw["arms"]["base"]["reasoning_harm"] == {
        "rate": 123 / 144, "lo": pytest.approx(0.787333, abs=1e-6), "hi": pytest.approx(0.902595, abs=1e-6), "n": 144,
    }  # fmt: skip
    assert raw["judge"]["agreement"]["held out"]["accuracy"]["n"] == 100
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]


def test_undefined_figure_is_null_in_json_and_nan_when_read_back(tmp_path: Path) -> None:
    nothing = Rate(rate=math.nan, lo=math.nan, hi=math.nan, n=144)
    report = sample(changes={"drop": nothing}, goals=[Goal(name="drop", wanted=">= 70 %", got=nothing, met=False)])
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["changes"]["drop"] == {"rate": None, "lo": None, "hi": None, "n": 144}
    back = Report.model_validate_json(text)
    assert math.isnan(back.changes["drop"].rate)
    assert isinstance(back.goals[0].got, Rate)
    assert "drop: undefined n=144, wanted >= 70 %" in printed(back, 170)


def test_a_failed_page_leaves_the_figures_and_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(sample(), tmp_path)
    old = (tmp_path / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", _full_disk_for_pages(Path.replace))
    with pytest.raises(OSError, match="disk full"):
        write_report(sample(title="New"), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["title"] == "New"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def _full_disk_for_pages(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def replace(self: Path, target: Path) -> Path:
        if target.suffix == ".html":
            raise OSError("disk full")
        return real(self, target)

    return replace


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (Rate(rate=0.421, lo=0.343, hi=0.502, n=144), "percent", "42.1 % [34, 50] n=144"),
        (Rate.of(0, 120), "percent", "0.0 % [0, 3] n=120"),
        (Rate.of(0, 0), "percent", "no cases n=0"),
        (Rate(rate=-0.0004, lo=-0.03, hi=0.004, n=120), "points", "+0.0 points [-3, 0] n=120"),
        (Rate(rate=-0.025, lo=-0.05, hi=0.01, n=120), "points", "-2.5 points [-5, 1] n=120"),
        (thousand(124, 144), "per 1,000", "861 [795, 908] n=144"),
        (21.5, "percent", "21.5"),
    ],
)
def test_one_cell(figure: Rate | float, unit: Unit, text: str) -> None:
    assert show(figure, unit) == text


def test_plain_figures() -> None:
    assert [value_text(v) for v in (0.8, 1234.5, 16.42, math.nan, 0, "gpu", Rate.of(90, 100))] == [
        "0.8", "1,234", "16.4", "undefined", "0", "gpu", "0.900 [0.826, 0.945] n=100",
    ]  # fmt: skip


def test_wide_terminal_has_one_line_per_arm_in_the_reports_order() -> None:
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in printed(sample(), 170).splitlines()]
    arms = [line for line in lines if line.startswith(("base", "other"))]
    assert arms == [
        "base  85.4 % [79, 90] n=144  84.0 % [77, 89] n=144  2.5 % [1, 7] n=120  no guard  91.7 % [85, 95] n=120"
        "  no guard",
        "base + guard  18.1 % [13, 25] n=144  16.7 % [11, 24] n=144  3.3 % [1, 8] n=120  861 [795, 908] n=144"
        "  91.7 % [85, 95] n=120  16.4",
        "other  41.7 % [34, 50] n=144  40.3 % [33, 48] n=144  7.5 % [4, 14] n=120  no guard  91.7 % [85, 95] n=120"
        "  no guard",
    ]
    assert "a trigger in its place  10.0 % [4, 21] n=50  90.0 % [79, 96] n=50" in lines
    assert lines[-3:] == [
        "1 of 2 goals met",
        "met  drop: 78.9 % [71, 86] n=144, wanted >= 70 %",
        "missed minutes: 21.5, wanted <= 20",
    ]


def test_narrow_terminal_cuts_no_cell() -> None:
    text = printed(sample(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for part in ("85.4 %", "[79, 90]", "n=144", "[795, 908]", "Interventions", "+ guard"):
        assert part in text


def test_hostile_text_is_text_on_the_page(tmp_path: Path) -> None:
    page = write_report(hostile_report(), tmp_path).read_text(encoding="utf-8")
    assert [raw for raw in RAW if raw in page] == []
    assert page.count(SHOWN_HOSTILE) >= 14
    assert '<mark class="cue"><span class="tag">cue</span>&lt;script&gt;</mark>alert(' in page
    assert (tmp_path / "report.json").read_text(encoding="utf-8").isascii()


def test_hostile_text_is_text_on_the_terminal() -> None:
    text = printed(hostile_report(), 4000)
    assert [raw for raw in RAW[:7] if raw in text] == []
    assert text.count(r"\u202egnp.exe\u2066\x1b[31m\x9b2J\x07\x00\u200b[red]") == 5


def test_a_new_line_in_a_name_forges_no_line_on_the_terminal() -> None:
    goal = Goal(name="drop\nmet    everything", wanted="1", got=1.0, met=False)
    lines = printed(sample(goals=[goal]), 170).splitlines()
    assert lines[-1].strip() == r"missed drop\nmet    everything: 1, wanted 1"


def test_visible_keeps_ordinary_text() -> None:
    plain = "Straße 中文 שלום\n\tfine."
    assert visible(plain) == plain
    assert visible("a\u2028b\U000e0041\ufeff\r") == r"a\u2028b\U000e0041\ufeff\r"


def test_segments_mark_spans_and_leave_out_what_does_not_fit() -> None:
    cues = [Span(start=a, end=b, kind="cue") for a, b in ((2, 4), (3, 7), (50, 60))]
    spans = [Span(start=6, end=9, kind="trigger"), *cues]
    arm_text = TranscriptArm(reasoning="0123456789", answer="", spans=spans)
    assert segments(arm_text) == [(None, "01"), ("cue", "23"), (None, "45"), ("trigger", "678"), (None, "9")]
    assert segments(arm_text, 8) == [
        (None, "01"), ("cue", "23"), (None, "45"), ("trigger", "67"), (None, " [2 more characters]"),
    ]  # fmt: skip
    assert segments(TranscriptArm(reasoning="", answer="")) == []


def test_long_texts_are_bounded() -> None:
    reply = TranscriptArm(reasoning="q" * 1_000_000, answer="z" * 1_000_000)
    page = render(sample(transcripts=[Transcript(request="r", label="harmful", arms={"base": reply})]))
    assert max(len(run) for run in re.findall("q+", page)) == SHOWN_CHARS
    assert max(len(run) for run in re.findall("z+", page)) == SHOWN_CHARS
    assert page.count("[996,000 more characters]") == 2
    assert cut("abc", 3) == "abc"


class Outline(HTMLParser):
    """Fails on a tag that is closed out of order or left open; collects attributes and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", [sample, hostile_report])
def test_page_is_well_formed_and_stands_alone(make: Callable[[], Report]) -> None:
    page = render(make())
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    assert not {"script", "link", "iframe", "img", "object", "form", "base"} & set(outline.tags)
    assert re.search(r"https?:|//\w|@import|url\((?!#)", page) is None
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in outline.attributes
    assert [name for name, _ in outline.attributes if name.startswith("on")] == []
    ids = [value for name, value in outline.attributes if name == "id"]
    assert sorted(ids) == sorted(set(ids))
    targets = [value for name, value in outline.attributes if name in ("href", "xlink:href")]
    assert all(t.startswith("#") and t[1:] in ids for t in targets)


def test_page_without_anything_to_show() -> None:
    page = render(
        sample(arms={}, controls={}, changes={}, goals=[], transcripts=[], speed={}, environment={}, notes=[])
    )
    for sentence in ("No transcripts were kept.", "No arm was evaluated.", "No goals were set.", "Not measured."):
        assert sentence in page
    assert "<svg" not in page
    assert "goals met" not in printed(sample(goals=[]), 170)


def test_page_says_which_goals_were_missed_and_how_many_transcripts_are_left() -> None:
    transcript = sample().transcripts[0]
    page = render(sample(transcripts=[transcript] * 5))
    assert "1 of 2 goals were met; 1 was missed." in page
    assert '<span class="badge missed">missed</span></td><th scope="row">minutes</th>' in page
    assert page.count('<article class="transcript">') == 3
    assert "2 more are in report.json." in page


def bars(svg: str) -> dict[str, float]:
    """Height of every bar by its id, in the figure's points."""
    found = {}
    for name, path in re.findall(r'<g id="([\w+-]*bar-\d-\d)">\s*<path d="([^"]+)"', svg):
        ys = [float(y) for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        found[name] = max(ys) - min(ys)
    return found


def test_arms_figure_has_one_bar_of_the_right_height_per_rate() -> None:
    svg = plots.arms({"base": arm(144, 60), "base+guard": arm(36, 6)}) or ""
    heights = bars(svg)
    assert list(heights) == [f"arms-bar-{series}-{group}" for series in range(3) for group in range(2)]
    full = heights["arms-bar-0-0"]
    shares = [height / full for height in heights.values()]
    assert shares == pytest.approx([1, 36 / 144, 142 / 144, 34 / 144, 60 / 120, 6 / 120], abs=1e-4)
    assert svg.count('id="arms-interval-') == 6
    assert "<desc>Reasoning harm in %: base 100 (97 to 100, n=144), base+guard 25 (19 to 33, n=144)." in svg
    assert svg == plots.arms({"base": arm(144, 60), "base+guard": arm(36, 6)})


def test_other_figures_have_their_bars() -> None:
    arms = {"base+guard": arm(26, 4, 144), "aligned+guard": arm(9, 4, 36)}
    heights = bars(plots.interventions(arms) or "")
    assert heights["interventions-bar-1-0"] / heights["interventions-bar-0-0"] == pytest.approx(0.25, abs=1e-4)
    assert len(heights) == 4
    assert len(bars(plots.interventions({"base+guard": arms["base+guard"]}) or "")) == 2
    assert plots.interventions({"base": arm(9, 4)}) is None
    assert len(bars(plots.controls(sample().controls) or "")) == 6


def test_a_rate_without_cases_has_no_bar() -> None:
    control = Control(reasoning_harm=Rate.of(0, 0), refusal=Rate.of(1, 2))
    svg = plots.controls({"cue": control}) or ""
    assert list(bars(svg)) == ["controls-bar-1-0"]
    assert ">no data<" in svg
