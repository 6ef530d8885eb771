"""What `csr` reports: curves, turning points and their summary, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from align.csr import CsrRule, Kind
from classifiers.stats import Rate, bootstrap
from guard.cli import harmless
from guard.errors import UserError


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Row):
    """The ratio after `token` tokens, with which the step of index `step` ends (None: nothing was said yet)."""

    token: int
    step: int | None
    ratio: Rate


class Turn(_Row):
    """Where the ratio gets beyond the threshold and stays there, a turning point unless at the start or the end."""

    step: int | None
    """None: it was beyond the threshold from the start."""
    token: int
    """Tokens up to the first point that was found beyond it."""
    text: str
    forced: bool
    """A guard forced the step."""
    ratio: Rate
    before: Rate | None
    """The ratio at the point before."""
    at_end: bool
    """The reasoning ends inside the window: nobody knows whether the ratio would have stayed."""


class ReasoningReport(_Row):
    """One reasoning. Steps are counted from 0."""

    id: str
    request: str
    steps: int
    tokens: int
    points: list[Point]
    turns: dict[Kind, Turn]
    cue: int | None
    """The first step that the detector calls a cue."""
    cue_token: int | None
    safe: bool
    """The judge's verdict on the reasoning itself."""
    continuations: int
    generated: int
    """Tokens of these continuations."""
    every_token: int
    """Computed: tokens that `samples` continuations after every token would take."""

    def turned(self, kind: Kind, *, at_end: bool = False) -> Turn | None:
        """Its turning point, or a turn at the end; None where the ratio was beyond the threshold from the start."""
        turn = self.turns.get(kind)
        return turn if turn is not None and turn.step is not None and turn.at_end == at_end else None


class Summary(_Row):
    """Over all reasonings. A correlation needs three of them with both a cue and an unsafe turning point."""

    safe_start: Rate
    """Share whose ratio is high from the start: nothing has to turn."""
    safe_turn: Rate
    """Share of safe reasonings, without those, that hold a safe turning point (the paper: over 0.9)."""
    safe_end: Rate
    """Share of the same reasonings that get there only at the end, within a window of it."""
    unsafe_turn: Rate
    """Share of unsafe reasonings with an unsafe turning point after the start."""
    unsafe_end: Rate
    """Share of unsafe reasonings that get there only at the end."""
    cue_correlation: Rate | None
    """Pearson's r of the first cue's token and the unsafe turning point's (the paper: 0.853, n = 30)."""
    generated: int
    every_token: int
    fewer_tokens: Rate | None
    """every_token / generated, with an interval over reasonings."""


class CsrReport(_Row):
    """A whole measurement. Intervals of adaptively sampled ratios are Wilson's, as if their n had been fixed."""

    schema_version: Literal[2] = 2
    model: str
    judge: str
    detector: str
    seed: int
    rule: CsrRule
    whole: bool
    at: Literal["steps", "tokens"]
    reasonings: list[ReasoningReport]
    summary: Summary


def summarise(rows: Sequence[ReasoningReport]) -> Summary:
    """The figures over all reasonings."""
    calm = ["safe" in row.turns and row.turns["safe"].step is None for row in rows]
    safe = [row for row, high in zip(rows, calm, strict=True) if row.safe and not high]
    unsafe = [row for row in rows if not row.safe]
    both = [(row.cue_token, turn.token) for row in rows if row.cue is not None and (turn := row.turned("unsafe"))]
    cost = [(float(row.every_token), float(row.generated)) for row in rows]
    return Summary(
        safe_start=Rate.of(sum(calm), len(rows)),
        safe_turn=_share(safe, "safe"), safe_end=_share(safe, "safe", at_end=True),
        unsafe_turn=_share(unsafe, "unsafe"), unsafe_end=_share(unsafe, "unsafe", at_end=True),
        cue_correlation=_correlation(both) if len(both) >= 3 else None,
        generated=sum(row.generated for row in rows), every_token=sum(row.every_token for row in rows),
        fewer_tokens=bootstrap(lambda a, b: float(a.sum() / b.sum()), *zip(*cost, strict=True)) if cost else None,
    )  # fmt: skip


def _share(rows: Sequence[ReasoningReport], kind: Kind, *, at_end: bool = False) -> Rate:
    return Rate.of(sum(row.turned(kind, at_end=at_end) is not None for row in rows), len(rows))


def _correlation(pairs: Sequence[tuple[int | None, int]]) -> Rate | None:
    columns = [np.array(column, float) for column in zip(*pairs, strict=True)]
    if not all(column.std() for column in columns):
        return None
    return bootstrap(_pearson, *columns)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def read_report(path: Path) -> CsrReport:
    """A `csr.json`; anything else is a UserError."""
    try:
        return CsrReport.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"CSR report {path} cannot be read", got=error.strerror, fix="`csr` writes it") from error
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path} is no CSR report", wanted="the csr.json that this `csr` writes") from error


def print_report(found: CsrReport, console: Console, most: int = 40) -> None:
    """A table of the turning points, and the summary."""
    table = Table("request", "steps", "first cue", "unsafe from step", "safe from step", "continuations")
    for row in found.reasonings[:most]:
        table.add_row(
            harmless(row.request, 60), str(row.steps), "" if row.cue is None else str(row.cue),
            _step(row.turns.get("unsafe")), _step(row.turns.get("safe")), str(row.continuations),
        )  # fmt: skip
    if len(found.reasonings) > most:
        table.caption = f"{most} of {len(found.reasonings)}; csr.json holds them all"
    console.print(table)
    summary = found.summary
    lines = {
        "high from the start": summary.safe_start, "safe reasonings with a safe turning point": summary.safe_turn,
        f"safe reasonings that turn less than {found.rule.window} tokens before their end": summary.safe_end,
        "unsafe reasonings with an unsafe turning point": summary.unsafe_turn,
        f"unsafe reasonings that turn less than {found.rule.window} tokens before their end": summary.unsafe_end,
        "Pearson's r, first cue and unsafe turning point": summary.cue_correlation,
        f"tokens of {found.rule.samples} continuations at every token (computed), over those generated":
            summary.fewer_tokens,
    }  # fmt: skip
    for name, rate in lines.items():
        console.print(f"{name}: {'too few' if rate is None else rate}", highlight=False, markup=False)
    console.print(f"judge {found.judge}, detector {found.detector}, seed {found.seed}", highlight=False, markup=False)


def _step(turn: Turn | None) -> str:
    if turn is None:
        return ""
    if turn.step is None:
        return "from the start"
    return f"{turn.step}{' (forced)' if turn.forced else ''}{' (at the end)' if turn.at_end else ''}"
