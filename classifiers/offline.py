"""Scores recorded reasoning exactly as the live guard would score it, under the default policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict, model_validator

from classifiers.detector import Detector
from classifiers.readable import unreadable
from guard.policy import Policy
from guard.steps import split_text

POLICY = Policy()


class ScoreRow(BaseModel):
    """One reasoning to score, as text or as steps already split."""

    model_config = ConfigDict(extra="forbid")

    id: str
    request: str
    reasoning: str | None = None
    steps: list[str] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ScoreRow:
        if (self.reasoning is None) == (self.steps is None):
            raise ValueError('wanted either "reasoning" or "steps"')
        return self


class ScoredStep(BaseModel):
    """A step with its score, whether it can be read at all, and whether the default policy would answer it."""

    text: str
    score: float
    unreadable: bool
    cue: bool


class ScoredRow(BaseModel):
    """The steps of one reasoning and the index of its first cue."""

    id: str
    steps: list[ScoredStep]
    first_cue: int | None


def score_rows(detector: Detector, rows: Iterable[ScoreRow]) -> Iterator[ScoredRow]:
    """Score rows one by one, lazily."""
    for row in rows:
        texts = row.steps if row.steps is not None else split_text(row.reasoning or "")
        scores = detector.score(detector.request(row.request), texts).tolist()
        steps = [_step(text, score, detector.threshold) for text, score in zip(texts, scores, strict=True)]
        first = next((index for index, step in enumerate(steps) if step.cue), None)
        yield ScoredRow(id=row.id, steps=steps, first_cue=first)


def _step(text: str, score: float, threshold: float) -> ScoredStep:
    hidden = unreadable(text)
    cue = POLICY.is_cue(score, threshold=threshold, unreadable=hidden)
    return ScoredStep(text=text, score=score, unreadable=hidden, cue=cue)
