"""Pairs: two continuations of one prefix that part at the divergence, as token ids with their provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from guard.errors import UserError
from guard.steps import StepLimits, StepSplitter, TokenTable

Kind = Literal["intervened", "benign"]


class Scope(BaseModel):
    """Which tokens carry the preference: the first `steps` steps after the divergence, or everything (None).

    The paper leaves it open. With the answer inside, a 135M model kept complying in its reasoning and only turned its
    answers into refusals, on benign requests too; the divergence step alone decides which way a trace goes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = 1


class Pair(BaseModel):
    """One preference: after `prompt_ids + prefix_ids`, `chosen_ids` is better than `rejected_ids`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    kind: Kind
    guard_id: str
    """The trace it comes from."""
    request: str
    prompt_ids: list[int]
    prefix_ids: list[int]
    """Output tokens that both sides share; its length is the divergence."""
    chosen_ids: list[int]
    rejected_ids: list[int]
    trigger_id: str
    chosen_harm: float
    rejected_harm: float
    """The judge's reasoning harm of each whole side."""


def pair_id(*parts: object) -> str:
    """A stable id over what makes the pair unique."""
    return hashlib.sha256("\x00".join(map(str, parts)).encode()).hexdigest()[:16]


def cut(ids: list[int], scope: Scope, table: TokenTable, limits: StepLimits) -> list[int]:
    """The part of one side that carries the preference: its first `scope.steps` steps, a delimiter ending the last."""
    if scope.steps is None:
        return ids
    splitter = StepSplitter(table, limits)
    left = scope.steps
    for index, token in enumerate(ids):
        special = token in table.markers
        if special or splitter.push(token, index) is not None:
            left -= 1
        if special or left == 0:
            return ids[: index + 1]
    return ids


def dedupe(pairs: Iterable[Pair], per_request: int) -> tuple[list[Pair], int]:
    """Pairs without exact repeats and at most `per_request` of one request; also how many were dropped."""
    kept: list[Pair] = []
    seen: set[tuple[tuple[int, ...], ...]] = set()
    counts: dict[str, int] = {}
    dropped = 0
    for pair in pairs:
        key = tuple(tuple(part) for part in (pair.prompt_ids, pair.prefix_ids, pair.chosen_ids, pair.rejected_ids))
        if key in seen or counts.get(pair.request, 0) >= per_request:
            dropped += 1
            continue
        seen.add(key)
        counts[pair.request] = counts.get(pair.request, 0) + 1
        kept.append(pair)
    return kept, dropped


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Writes JSON lines in one move, so that a reader never sees half a file."""
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(pair.model_dump_json() + "\n" for pair in pairs), encoding="utf-8")
    scratch.replace(path)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file; a missing or malformed file is a UserError."""
    if not path.exists():
        raise UserError(f"Pairs file {path} does not exist", fix="Run `cli.py align pairs` first")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pairs.append(Pair.model_validate_json(line))
        except ValueError as error:
            raise UserError(f"Pairs file {path}, line {number} is malformed", got=line[:80]) from error
    return pairs
