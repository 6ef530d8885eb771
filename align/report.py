"""The report of one run: `report.json` for machines, one self-contained `report.html`, one table for the terminal.

Requests, reasoning and answers are hostile input: whatever leaves this module for a page or a terminal goes through
`visible` first; the page is escaped on top of that and holds no script and no address.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.controls import Control
from align.evaluate import ArmReport
from align.figures import Grid, Unit, Value, parts, show, unit_of, value_text
from classifiers.stats import Rate

Values = Mapping[str, Annotated[Rate | str | float | Mapping[str, Value], Field(union_mode="left_to_right")]]
Columns = tuple[tuple[str, str, Unit, str], ...]

ARM_ORDER = (
    "base", "base+guard", "base+substitute", "aligned", "aligned+guard", "base+primer", "base+keyword", "sft",
    "full-dpo", "full-dpo-norm",
)  # fmt: skip
#: Title, ArmReport field, unit, and what a reader should wish for.
COLUMNS: Columns = (
    ("Reasoning harm", "reasoning_harm", "percent", "lower is better"),
    ("Answer harm", "answer_harm", "percent", "lower is better"),
    ("Benign refusals", "benign_refusal", "percent", "lower is better"),
    ("Interventions per 1,000", "interventions_per_1000", "per 1,000", "harmful requests"),
    ("Sound benign replies", "quality", "percent", "higher is better"),
    ("Injected tokens", "injected_tokens", "plain", "per intervened request"),
)
DETAILS: Columns = (
    ("Harm in reasoning or answer", "any_harm", "percent", "lower is better"),
    ("Harmful requests refused", "harmful_refusal", "percent", "higher is better"),
    ("Neither refused nor harmful", "unsettled", "percent", "read some"),
    ("Ordinary refused", "ordinary_refusal", "percent", "lower is better"),
    ("Alarming refused", "alarming_refusal", "percent", "lower is better"),
    ("Alarming answered without harm", "alarming_harmless", "percent", "higher is better"),
    ("Interventions per 1,000", "benign_interventions_per_1000", "per 1,000", "benign requests, lower is better"),
    ("Unscored steps", "unscored_steps", "plain", "should be 0"),
)
CONTROLS = {"cue": "its own cue", "trigger": "a trigger in its place", "neutral": "a neutral sentence in its place"}
SHOWN_TRANSCRIPTS = 3
SHOWN_CHARS = 4000
#: Columns a terminal needs to hold one arm on one line.
WIDE = 152


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Span(_Part):
    """A marked part of a reasoning text, in characters, half open."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    kind: Literal["cue", "trigger"]


class TranscriptArm(_Part):
    """What one arm replied."""

    reasoning: str
    answer: str
    spans: list[Span] = []


class Transcript(_Part):
    """One request and the replies of several arms, side by side."""

    request: str
    label: str
    arms: dict[str, TranscriptArm]


class Goal(_Part):
    """A figure the run had to reach. A `got` without an interval is shown as it is, a rate by `unit_of(name)`."""

    name: str
    wanted: str
    got: Annotated[Rate | float, Field(union_mode="left_to_right")]
    met: bool

    @classmethod
    def of(cls, name: str, sign: str, limit: float, got: Rate) -> Self:
        """A rate that has to be `>=` or `<=` a limit; one without cases is not."""
        met = got.n > 0 and (got.rate >= limit if sign == ">=" else got.rate <= limit)
        return cls(name=name, wanted=f"{sign} {limit:.0%}", got=got, met=met)


class JudgeCard(_Part):
    """Which judge, and how far it agrees with labelled replies (one level of grouping allowed)."""

    version: str
    agreement: Values


class DetectorCard(_Part):
    """Which detector intervened, and from which score on."""

    version: str
    threshold: float


class Report(_Part):
    """Everything `report.json` holds. Figures that are undefined (0 / 0) are NaN here and null there."""

    title: str
    arms: dict[str, ArmReport]
    controls: dict[str, Control]
    changes: dict[str, Rate]
    """By name; `unit_of` tells from the name whether it is shown as a percentage or in points."""
    goals: list[Goal]
    speed: Values
    environment: dict[str, str]
    judge: JudgeCard
    detector: DetectorCard
    seeds: list[int]
    command: str
    transcripts: list[Transcript] = []
    notes: list[str] = []
    grids: dict[str, Grid] = {}
    """Further tables by name: reasoning tasks, seeds, another judge, the paper's tables."""

    @field_validator("arms", "controls", "changes", "goals", "speed", "judge", "grids", mode="before")
    @classmethod
    def _null_is_nan(cls, value: object, info: ValidationInfo) -> object:
        return _undefined(value) if info.mode == "json" else value


def write_report(report: Report, out_dir: Path) -> Path:
    """Writes `report.json`, then `report.html`, each whole or not at all; returns the page's path."""
    out_dir.mkdir(parents=True, exist_ok=True)
    # ASCII only: a JSON file is often read in a terminal, and its text is hostile.
    data = json.dumps(json.loads(report.model_dump_json()), indent=2)
    _write_whole(out_dir / "report.json", data + "\n")
    _write_whole(out_dir / "report.html", render(report))
    return out_dir / "report.html"


def render(report: Report) -> str:
    """The page. Every expression of the template is cleaned by `visible` and escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from align import plots

    def clean(value: object) -> object:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, finalize=clean,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    arms = {visible(name): arm for name, arm in ordered(report.arms).items()}
    found = {visible(name): row for name, row in report.controls.items()}
    drawn = {"arms": plots.arms(arms), "interventions": plots.interventions(arms), "controls": plots.controls(found)}
    return environment.get_template("report.html.j2").render(
        report=report, arms=arms, columns=COLUMNS, details=DETAILS, control_names=CONTROLS,
        plots={name: Markup(svg or "") for name, svg in drawn.items()},
        cells=cells, parts=parts, unit_of=unit_of, value=value_text, segments=segments, cut=cut,
        transcripts=report.transcripts[:SHOWN_TRANSCRIPTS],
    )  # fmt: skip


def print_table(report: Report, console: Console) -> None:
    """Prints arms, controls, and which goals were met, to a terminal of any width."""
    console.print(Text(_line(report.title), style="bold"), Text(), sep="\n")
    console.print(_arms_table(report, wide=console.width >= WIDE))
    if report.controls:
        console.print(Text("\nHarmful reasoning, cut before its first cue and continued after"))
        table = _table("Continued after", "Reasoning harm", "Refusals")
        for name, row in report.controls.items():
            table.add_row(
                Text(CONTROLS.get(name, _line(name))), Text(show(row.reasoning_harm)), Text(show(row.refusal))
            )
        console.print(table)
    if report.goals:
        met = sum(goal.met for goal in report.goals)
        console.print(Text(f"\n{met} of {len(report.goals)} goals met", style="bold"))
        table = Table.grid(padding=(0, 1))
        for goal in report.goals:
            words = f"{goal.name}: {show(goal.got, unit_of(goal.name))}, wanted {goal.wanted}"
            outcome = Text("met", style="green") if goal.met else Text("missed", style="bold red")
            table.add_row(outcome, Text(_line(words)))
        console.print(table)


def visible(text: str) -> str:
    """Replaces control, format (bidi, zero width) and unassigned characters with escapes; new lines and tabs stay."""
    return "".join(c.encode("unicode_escape").decode("ascii") if _hidden(c) else c for c in text)


def cut(text: str, limit: int = SHOWN_CHARS) -> str:
    """The first `limit` characters; says how many were left out."""
    return text if len(text) <= limit else f"{text[:limit]} [{len(text) - limit:,} more characters]"


def segments(arm: TranscriptArm, limit: int = SHOWN_CHARS) -> list[tuple[str | None, str]]:
    """The reasoning as (kind, text) in order; spans past its end or inside an earlier span are left out."""
    found: list[tuple[str | None, str]] = []
    text, at = arm.reasoning, 0
    for span in sorted(arm.spans, key=lambda s: s.start):
        end = min(span.end, len(text), limit)
        if at <= span.start < end:
            found += [(None, text[at : span.start]), (span.kind, text[span.start : end])]
            at = end
    return [(kind, part) for kind, part in [*found, (None, cut(text[at:], limit - at))] if part]


def cells(name: str, arm: ArmReport, columns: Columns) -> list[tuple[str, str, str]]:
    """One arm's row. What only a guard can cause is no measurement in an arm without one."""
    guarded = name.endswith(("+guard", "+substitute"))
    row = [(unit, getattr(arm, field)) for _, field, unit, _ in columns]
    return [
        ("no guard", "", "") if unit in ("per 1,000", "plain") and not guarded
        else parts(figure, unit) if isinstance(figure, Rate) else (value_text(figure), "", "")
        for unit, figure in row
    ]  # fmt: skip


def ordered(arms: Mapping[str, ArmReport]) -> dict[str, ArmReport]:
    """Arms in the report's order, unknown ones last."""
    return {name: arms[name] for name in dict.fromkeys((*ARM_ORDER, *arms)) if name in arms}


def _table(*titles: str, leading: int = 0) -> Table:
    table = Table(titles[0], box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), leading=leading)
    for title in titles[1:]:
        table.add_column(title, justify="right")
    return table


def _arms_table(report: Report, *, wide: bool) -> Table:
    # A narrow terminal has room for all columns only with one word in a line.
    join = " " if wide else "\n"
    table = _table("Arm", *(title.replace(" ", join) for title, *_ in COLUMNS), leading=0 if wide else 1)
    for name, arm in ordered(report.arms).items():
        head = _line(name).replace("+", f"{join}+ ")
        row = [join.join(filter(None, cell)) for cell in cells(name, arm, COLUMNS)]
        table.add_row(*(Text(text) for text in (head, *row)))
    return table


def _hidden(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char).startswith("C") or char in "\u2028\u2029")


def _line(text: str) -> str:
    return visible(cut(text)).replace("\n", "\\n").replace("\t", "\\t")


def _undefined(value: object) -> object:
    if isinstance(value, dict):
        return {key: _undefined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_undefined(item) for item in value]
    return math.nan if value is None else value


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
