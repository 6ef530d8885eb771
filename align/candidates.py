"""Which triggers are tried where: candidates of sources, seeded, within limits."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from align.pairs import Quota
from align.sources import Kind, Source
from guard.steps import TokenTable
from guard.triggers import EncodedTrigger, Place


class RolloutSettings(BaseModel):
    """How many counterfactuals, and how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    triggers: int = Field(default=1, ge=1)
    """Triggers tried per intervened source (the paper: six)."""
    rounds: int = Field(default=1, ge=1, le=16)
    """Interventions on one continuation: the next round cuts off a cue that came back (paper, Fig. 6: up to 5)."""
    max_generations: int = Field(default=14, ge=1)
    """Continuations generated for one request, its first reply included (paper, section 4: at most 14)."""
    max_intervened: int | None = Field(default=160, ge=0)
    """Intervened sources that are rolled out, a seeded choice; None: all."""
    max_benign: int | None = Field(default=130, ge=0)
    """The same of sources without a cue: training leaves out what exceeds its share of benign pairs."""
    max_tokens: int = Field(default=120, ge=1)
    """Of one continuation."""
    sample_tokens: int = Field(default=160, ge=1)
    """Of the first reply to a prompt."""
    quota: Quota = Quota()
    seed: int = 0

    @property
    def hash(self) -> str:
        """12 hex digits that change with any setting."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def unlimited(self) -> Self:
        """The same for every source that there is."""
        return self.model_copy(update={"max_intervened": None, "max_benign": None})


@dataclass(frozen=True)
class Candidate:
    """A source and the trigger that is tried at the end of its prefix."""

    id: str
    source: Source
    trigger: EncodedTrigger

    @property
    def kind(self) -> Kind:
        """The source's."""
        return self.source.kind

    @property
    def prefix(self) -> list[int]:
        """The source's."""
        return self.source.prefix


def candidates(
    sources: Sequence[Source], pool: Sequence[EncodedTrigger], settings: RolloutSettings
) -> tuple[list[Candidate], Counter[str]]:
    """What to roll out, seeded: the same sources give the same candidates; and how many sources the limits left out."""
    rng = random.Random(settings.seed)
    wanted: set[str] = set()
    left: Counter[str] = Counter()
    limits: tuple[tuple[Kind, int | None], ...] = (
        ("intervened", settings.max_intervened),
        ("benign", settings.max_benign),
    )
    for kind, most in limits:
        group = [s for s in sources if s.kind == kind]
        count = len(group) if most is None else min(most, len(group))
        wanted |= {s.id for s in rng.sample(group, count)}
        if count < len(group):
            left[f"{kind}: source over the limit of {most}"] = len(group) - count
    found: list[Candidate] = []
    for source in sources:
        if source.id not in wanted:
            continue
        if source.kind == "intervened":
            triggers = rng.sample(list(pool), min(settings.triggers, len(pool)))
        else:
            triggers = [rng.choice(list(pool))]
        found += [Candidate(f"{source.id}-{trigger.id}", source, trigger) for trigger in triggers]
    return found, left


def one_by_one(
    sources: Sequence[Source], pool: Sequence[EncodedTrigger], settings: RolloutSettings
) -> tuple[list[Candidate], Counter[str]]:
    """Candidates that depend on their own source alone, so that it does not matter which machine makes them."""
    found: list[Candidate] = []
    for source in sources:
        seed = int.from_bytes(hashlib.blake2b(f"{settings.seed}|{source.id}".encode(), digest_size=8).digest(), "big")
        found += candidates([source], pool, settings.unlimited().model_copy(update={"seed": seed}))[0]
    return found, Counter()


def place(before: Sequence[int], table: TokenTable) -> Place:
    """Whether a trigger after these output ids brings its own space: not after white space or a delimiter, nor as a
    zone's first text (what a live guard does)."""
    if not before:
        return "plain"
    last = before[-1]
    piece = table.bytes_of[last] if 0 <= last < len(table.bytes_of) else b""
    return "plain" if last in table.markers or piece[-1:].isspace() else "spaced"
