"""A step's clauses, scored beside the step: one calm clause or a claim of safety must not hide what the others say.

Both tiers read a step as a whole, a sum or a mean over its words, which whatever is added to it moves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from classifiers.encoder import Encoder, Vector
from classifiers.features import FeatureConfig, step_ids
from classifiers.hashed import HashedModel
from classifiers.windows import within

MOST_READ = 6
"""Clauses of one step that the encoder reads: those that the first tier ranks highest."""
MOST_INSIDE = 6
"""Windows of one step: a step has a hundred of the model's tokens, and the encoder's are seldom twice as many."""
_MOST, _LONGEST = 24, 3
"""Clauses of one step, and how many neighbours are read together: what follows a cue may belong to it."""
_FEWEST, _LONG = 4, 12
"""Words of a clause; words of one that is cut at conjunctions as well."""
_MARKS = re.compile(
    r"""(?<=[.!?;:…。！？；])\s+|(?<=[。！？；、])|,\s+|\s*[()\[\]{}"]+\s*|\s+(?:-{1,3}|/{1,3}|[|>~*=_]+)\s+"""
)
"""Where a view's clauses part: marks, brackets and quotes, dashes and the like between blanks."""
_CONJUNCTIONS = re.compile(r"\s(?=(?:and|but|while|so|because|although|whereas|since|then|or|which|that|if|though)\s)")


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the first tier says of a step."""

    highest: float | None
    """Its probability of the step or of the riskiest of its clauses; None for a step without words."""
    clauses: tuple[str, ...] = ()
    """Views of the riskiest clauses, the riskiest first."""


def clauses(view: str) -> list[str]:
    """The runs of up to three neighbouring clauses of a text as the scorer sees it; [] where there is only one.

    A clause has at least four words: fewer join the one before. Of more than 24 neighbours count as one.
    """
    found: list[str] = []
    for part in _MARKS.split(view):
        for clause in _CONJUNCTIONS.split(part) if part.count(" ") >= _LONG else (part,):
            if found and clause and min(clause.count(" "), found[-1].count(" ")) < _FEWEST - 1:
                found[-1] += f" {clause}"
            elif clause:
                found.append(clause)
    size = -(-len(found) // _MOST)
    found = [" ".join(found[at : at + size]) for at in range(0, len(found), size)] if size > 1 else found
    count = len(found)
    return [
        " ".join(found[start:stop])
        for start in range(count)
        for stop in range(start + 1, min(count, start + _LONGEST) + 1)
        if stop - start < count
    ]


def rank(
    steps: Sequence[tuple[str, bool]], model: HashedModel, features: FeatureConfig, view: Callable[[str], str]
) -> list[Ranked]:
    """What the first tier, `model`, says of steps, each with whether its clauses are read: all texts at once."""
    texts = [(seen := view(step), *(clauses(seen) if parted else ())) for step, parted in steps]
    rows = [[step_ids(text, features, str) for text in each] for each in texts]
    worded = [ids for row in rows for ids in row if ids]
    # The weights lie on a grid, so that a sum is exact and padding changes no score (`classifiers.export`).
    scores = iter(model.run(worded)[:, 0].tolist() if worded else ())
    return [
        _ranked(each[1:], [next(scores) if ids else None for ids in row]) for each, row in zip(texts, rows, strict=True)
    ]


def _ranked(parts: Sequence[str], scores: Sequence[float | None]) -> Ranked:
    if scores[0] is None:
        return Ranked(None)
    known = [score or 0.0 for score in scores]
    order = np.argsort([-score for score in known[1:]], kind="stable")[:MOST_READ]
    return Ranked(max(known), tuple(parts[index] for index in order.tolist()))


def of_long(encoder: Encoder, step: str) -> list[Vector]:
    """The vectors of the windows of a step that is too long to be read whole."""
    windows = encoder.windows(step)
    return [encoder.vector(ids) for ids in within(windows, MOST_INSIDE)] if len(windows) > 1 else []
