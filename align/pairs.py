"""Pairs: two continuations of one prefix that part at the divergence, as token ids with their provenance."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.errors import UserError
from guard.steps import StepLimits, StepSplitter, TokenTable

Kind = Literal["intervened", "benign"]
#: So many steps, up to where the reasoning closes, or everything (None).
Steps = int | Literal["reasoning"] | None


class Scope(BaseModel):
    """Which tokens carry the preference: the first `steps` steps after the divergence, the reasoning, or everything.

    The paper leaves it open. With the answer inside, a 135M model kept complying in its reasoning and only turned its
    answers into refusals, on benign requests too. Two steps, the trigger and what follows it, are what `align curve`
    chose on the demo model (docs/curve.md).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Steps = 2
    benign_steps: Steps = 8
    """The same of a benign pair's chosen side. With one step there, too, nothing kept the model's way to end: 22 of 120
    benign replies of the demo model never closed their reasoning, 0 of 120 before training."""

    def cut(self, pair: Pair, table: TokenTable, limits: StepLimits) -> tuple[list[int], list[int]]:
        """The parts of the chosen and the rejected side that carry the preference."""
        chosen = self.benign_steps if pair.kind == "benign" else self.steps
        return cut(pair.chosen_ids, chosen, table, limits), cut(pair.rejected_ids, self.steps, table, limits)


class Placed(BaseModel):
    """A trigger of an intervened side; `at` is the output index of its first id."""

    model_config = ConfigDict(extra="forbid")

    trigger_id: str
    at: int


class Provenance(BaseModel):
    """What a pair came about by: enough to find everything else again."""

    model_config = ConfigDict(extra="forbid")

    origin: Literal["trace", "prompt"]
    model: str
    tokenizer_hash: str
    policy_hash: str
    detector: str
    """Version of the detector that found the first cue, or none."""
    judge: str
    settings_hash: str
    """Of the `RolloutSettings` in the dataset card."""


class Pair(BaseModel):
    """One preference: after `prompt_ids + prefix_ids`, `chosen_ids` is better than `rejected_ids`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    kind: Kind
    guard_id: str
    """The trace it comes from, or the prompt."""
    tenant: str = ""
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
    interventions: list[Placed] = []
    """The triggers in order; a benign pair's one is on its rejected side."""
    chosen_finish: str | None = None
    rejected_finish: str | None = None
    """vLLM's word for why each side ended (`stop`: its last id is an EOS the model produced); None: not recorded."""
    provenance: Provenance | None = None
    """None only in a pair that was written by hand."""
    earlier: bool = Field(default=False, exclude=True)
    """Of a run before this one (`align.watermark`). No file holds it: it says nothing of the pair itself."""
    answered: bool = Field(default=False, exclude=True)
    """A benign pair whose request the stage before answers (`align.recipe`): there is less to learn from it than from
    one that it refuses. No file holds it."""


class Quota(BaseModel):
    """How many pairs may come from one request, and from one tenant (None: any number)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_request: int = Field(default=4, ge=1)
    per_tenant: int | None = Field(default=None, ge=1)


def pair_id(*parts: object) -> str:
    """A stable id over what makes the pair unique."""
    return hashlib.sha256("\x00".join(map(str, parts)).encode()).hexdigest()[:16]


def cut(ids: list[int], steps: Steps, table: TokenTable, limits: StepLimits) -> list[int]:
    """The first `steps` steps; a delimiter ends the last one."""
    if steps is None:
        return ids
    splitter = StepSplitter(table, limits)
    left = math.inf if steps == "reasoning" else steps
    for index, token in enumerate(ids):
        special = token in table.markers
        if special or splitter.push(token, index) is not None:
            left -= 1
        if special or left == 0:
            return ids[: index + 1]
    return ids


def dedupe(pairs: Iterable[Pair], quota: Quota) -> tuple[list[Pair], Counter[str]]:
    """Pairs without exact repeats and within the quotas, in their order; also how many were dropped, and why."""
    kept: list[Pair] = []
    seen: set[tuple[tuple[int, ...], ...]] = set()
    requests: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for pair in pairs:
        key = tuple(tuple(part) for part in (pair.prompt_ids, pair.prefix_ids, pair.chosen_ids, pair.rejected_ids))
        request = request_key(pair.request)
        if key in seen:
            dropped["repeat"] += 1
        elif requests[request] >= quota.per_request:
            dropped["over the request's quota"] += 1
        elif quota.per_tenant is not None and tenants[pair.tenant] >= quota.per_tenant:
            dropped["over the tenant's quota"] += 1
        else:
            seen.add(key)
            requests[request] += 1
            tenants[pair.tenant] += 1
            kept.append(pair)
    return kept, dropped


def request_key(request: str) -> str:
    """What counts as one request: case and white space would otherwise buy a second quota."""
    return " ".join(request.casefold().split())


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
