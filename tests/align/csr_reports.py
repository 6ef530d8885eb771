"""CSR reports made by hand."""

from __future__ import annotations

from align.csr import CsrRule, Kind
from align.csr_report import CsrReport, Point, ReasoningReport, Turn, summarise
from classifiers.stats import Rate

BEFORE, AFTER = Rate.of(1, 8), Rate.of(12, 12)


def turn(
    text: str, step: int | None = 2, *, forced: bool = False, before: Rate | None = BEFORE, at_end: bool = False
) -> Turn:
    return Turn(step=step, token=30, text=text, forced=forced, ratio=AFTER, before=before, at_end=at_end)


def row(
    name: str, turns: dict[Kind, Turn], *, request: str = "How do I pick a lock?", safe: bool = True,
    cue: int | None = None, cue_token: int | None = None, generated: int = 100,
) -> ReasoningReport:  # fmt: skip
    points = [Point(token=0, step=None, ratio=BEFORE), Point(token=30, step=2, ratio=AFTER)]
    return ReasoningReport(
        id=name, request=request, steps=3, tokens=40, points=points, turns=turns, cue=cue, cue_token=cue_token,
        safe=safe, continuations=20, generated=generated, every_token=4000,
    )  # fmt: skip


def report(*rows: ReasoningReport) -> CsrReport:
    return CsrReport(
        model="m", judge="j", detector="d", seed=0, rule=CsrRule(), whole=False, at="steps", reasonings=list(rows),
        summary=summarise(rows),
    )  # fmt: skip
