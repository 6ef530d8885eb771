"""Triggers in a YAML file: candidates to be read by a person and measured by `triggers rank`, never used by a guard.

A pool entry is `id`, `text`, `strong` (see `guard.triggers`); `evidence` says where a candidate was found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from classifiers.stats import Rate
from guard.errors import UserError
from guard.settings import read_mapping, validated
from guard.triggers import NEUTRAL, POOL, Trigger

MAX_CHARS = 200
#: Name of the control of `triggers rank` that inserts nothing.
NOTHING = "nothing"
HEAD = """\
# Candidates for the trigger pool, mined from turning points. They are what a model said: read each one.
# Nothing uses this file by itself. `cli.py triggers rank --candidates FILE` measures them beside the pool;
# to adopt one, copy its id, text and strong (does it refuse in so many words?) into POOL in guard/triggers.py.
"""


class Evidence(BaseModel):
    """Where a candidate was found: in how many requests, how often, and what the ratio did there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int
    found: int
    before: Rate
    after: Rate
    """Safe continuations before and after the step, pooled over where it was found."""
    request_words: float
    """Share of its words that the request had: high in a sentence that fits one request only."""
    example: str
    """Id of a trace that holds it."""


class Candidate(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    text: str = Field(min_length=1, max_length=MAX_CHARS)
    strong: bool = False
    evidence: Evidence | None = None

    @property
    def trigger(self) -> Trigger:
        """As the pool holds it."""
        return Trigger(self.id, self.text, self.strong)


class TriggerFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    triggers: list[Candidate]


def write_candidates(candidates: Sequence[Candidate], path: Path) -> None:
    """Writes the file whole or not at all; UserError when it cannot be written."""
    body: dict[str, Any] = TriggerFile(triggers=list(candidates)).model_dump(mode="json")
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(HEAD + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=110), "utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"Candidates {path} cannot be written", got=error.strerror) from error


def read_candidates(path: Path) -> list[Candidate]:
    """The candidates of a file; a malformed one, or an id that is taken, is a UserError that names it."""
    found = validated(TriggerFile, read_mapping(path, "Candidates"), f"Candidates {path}").triggers
    # `triggers rank` gathers what followed a sentence under its id: two with one id would be measured as one.
    taken = {trigger.id: "in the pool" for trigger in POOL}
    taken |= dict.fromkeys((NEUTRAL.id, NOTHING), "a control of `triggers rank`")
    for candidate in found:
        if candidate.id in taken:
            raise UserError(
                f"Candidates {path}, an id is taken", got=f"`{candidate.id}`, which is {taken[candidate.id]}",
                wanted="an id of its own for each candidate", fix="Rename it",
            )  # fmt: skip
        taken[candidate.id] = "in the file twice"
    return found
