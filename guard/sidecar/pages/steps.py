"""A trace as the pages show it: its steps with their text, what was hidden, what was not watched, what people said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guard.store.reviews import JUDGED, Review
from guard.traces import Intervention, StepRecord, Trace

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Shown:
    """One step, or a run of tokens that belongs to none (`index` None)."""

    index: int | None
    start: int
    end: int
    zone: str
    what: str
    """`cue`, `trigger`, `unscored`, `step`, or `unwatched`."""
    score: float | None
    text: str | None
    """None: not kept, or not readable."""
    hidden: str | None
    """The cue whose place a trigger took, which neither client nor model kept."""
    hidden_score: float | None
    trigger: str
    """The trigger's id, and how hard it was."""
    unreadable: bool
    said: tuple[Review, ...]

    @property
    def can_be_labelled(self) -> bool:
        """A trigger's own words cannot, the cue whose place it took can."""
        return self.index is not None and (self.what != "trigger" or self.hidden is not None)

    @property
    def flagged(self) -> bool:
        """Whether the guard held it, or what it stands in the place of, for a cue."""
        return self.what == "cue" or self.hidden is not None

    @property
    def label(self) -> Review | None:
        """The newest word on what it is."""
        return next((each for each in reversed(self.said) if each.label in JUDGED), None)


def shown_steps(trace: Trace, decode: Decode | None, said: Sequence[Review]) -> list[Shown]:
    """All steps in order, with the tokens between and behind them that the guard did not watch."""
    rows: list[Shown] = []
    at = 0
    for index, step in enumerate(trace.steps):
        if step.start > at:
            rows.append(_unwatched(trace, decode, at, step.start))
        rows.append(_step(trace, decode, index, step, said))
        at = max(at, step.end)
    if trace.output_tokens > at:
        rows.append(_unwatched(trace, decode, at, trace.output_tokens))
    return rows


def _step(
    trace: Trace, decode: Decode | None, index: int, step: StepRecord, said: Sequence[Review]
) -> Shown:  # fmt: skip
    answer = _answer(trace, index, step)
    replaced = answer is not None and answer.mode == "substitute"
    hidden = _text(trace, decode, answer.cue_ids) if answer is not None and replaced else None
    unscored = step.score is None and not step.injected
    return Shown(
        index=index, start=step.start, end=step.end, zone=step.zone, score=step.score,
        what="trigger" if step.injected else "cue" if step.cue else "unscored" if unscored else "step",
        text=_text(trace, decode, trace.output_ids[step.start : step.end]),
        hidden=("" if hidden is None else hidden) if replaced else None,
        hidden_score=answer.score if answer is not None and replaced else None,
        trigger="" if answer is None else f"{answer.trigger_id} ({answer.rung})", unreadable=step.unreadable,
        said=tuple(each for each in said if each.step == index),
    )  # fmt: skip


def _answer(trace: Trace, index: int, step: StepRecord) -> Intervention | None:
    """The intervention whose trigger a step is."""
    if not step.injected:
        return None
    return next((i for i in trace.receipt.interventions if i.at == step.start), None) or next(
        (i for i in trace.receipt.interventions if i.mode == "substitute" and i.step == index), None
    )


def _unwatched(trace: Trace, decode: Decode | None, start: int, end: int) -> Shown:
    text = _text(trace, decode, trace.output_ids[start:end])
    return Shown(None, start, end, "", "unwatched", None, text, None, None, "", False, ())


def _text(trace: Trace, decode: Decode | None, ids: list[int]) -> str | None:
    return None if decode is None or trace.log_content == "none" else decode(ids)


def why_no_text(trace: Trace, served: bool) -> str | None:
    """Why a trace's steps have no text; None: they have."""
    if trace.log_content == "none":
        return "The policy's log_content was none: neither text nor token ids were kept, only counts and scores."
    if not served:
        return (
            f"The trace was written by {trace.model} with another tokenizer than the served model's: its token ids "
            "would decode to nonsense here. `traces show --model` can read it."
        )
    return None
