"""The dataset card: what pairs were made from, by what, and what was dropped; no request and no reasoning text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict

from align.candidates import RolloutSettings
from align.pairs import Pair, dedupe, request_key, write_pairs
from align.rollouts import Harvest
from classifiers.judge import Judge
from classifiers.stats import Rate
from guard.runtime import GuardRuntime

TEMPLATES = Path(__file__).parent / "templates"


class Generations(BaseModel):
    """Continuations generated per request."""

    model_config = ConfigDict(extra="forbid")

    total: int
    requests: int
    mean: float
    most: int
    limit: int


class RoundRow(BaseModel):
    """One round of interventions; `returned`: the share of continuations in which the detector found another cue."""

    model_config = ConfigDict(extra="forbid")

    generated: int
    returned: Rate | None
    """None: nothing was looked through, because no round came after."""


class Card(BaseModel):
    """What is known of a file of pairs. `pairs` and `dropped` are counts by kind and by reason."""

    model_config = ConfigDict(extra="forbid")

    pairs: dict[str, int]
    dropped: dict[str, int]
    sources: dict[str, int]
    candidates: int
    kept: Rate
    """Candidates that became pairs."""
    generations: Generations
    rounds: list[RoundRow]
    requests: int
    """Different requests among the pairs."""
    tenants: int
    largest_tenant: Rate
    """The largest tenant's share of the pairs."""
    triggers: dict[str, int]
    """Pairs by the first trigger's id."""
    interventions: dict[int, int]
    """Pairs by their number of interventions."""
    tokens: dict[str, float]
    """Median lengths: prefix, chosen, rejected."""
    model: str
    tokenizer_hash: str
    policy_hash: str
    detector: str
    judge: str
    judge_metrics: dict[str, Rate]
    settings: RolloutSettings
    settings_hash: str
    pairs_sha256: str
    """Of the file of pairs."""
    sources_sha256: str
    """Of the sorted ids of the traces and prompts that gave pairs."""


def publish(harvest: Harvest, settings: RolloutSettings, runtime: GuardRuntime, judge: Judge, out: Path) -> list[Pair]:
    """Applies duplicates and quotas; writes `pairs.json` and `pairs.md` (the card), and at last `pairs.jsonl`."""
    pairs, dropped = dedupe(harvest.pairs, settings.quota)
    harvest.dropped += dropped
    card = describe(pairs, harvest, settings, runtime, judge)
    (out / "pairs.json").write_text(card.model_dump_json(indent=1), encoding="utf-8")
    (out / "pairs.md").write_text(markdown(card), encoding="utf-8")
    # Its presence says that all of this is done.
    write_pairs(pairs, out / "pairs.jsonl")
    return pairs


def describe(
    pairs: Sequence[Pair], harvest: Harvest, settings: RolloutSettings, runtime: GuardRuntime, judge: Judge
) -> Card:
    """The card of these pairs."""
    tenants = Counter(pair.tenant for pair in pairs)
    lines = "".join(pair.model_dump_json() + "\n" for pair in pairs)
    return Card(
        pairs={kind: sum(p.kind == kind for p in pairs) for kind in ("intervened", "benign")},
        dropped=dict(harvest.dropped.most_common()), sources=dict(sorted(harvest.sources.items())),
        candidates=harvest.candidates, kept=Rate.of(len(pairs), harvest.candidates),
        generations=_generations(harvest.generations, settings.max_generations),
        rounds=[
            RoundRow(generated=r.generated, returned=Rate.of(r.returned, r.watched) if r.watched else None)
            for r in harvest.rounds
        ],
        requests=len({request_key(p.request) for p in pairs}), tenants=len(tenants),
        largest_tenant=Rate.of(max(tenants.values(), default=0), len(pairs)),
        triggers=dict(Counter(p.trigger_id for p in pairs).most_common()),
        interventions=dict(sorted(Counter(len(p.interventions) for p in pairs).items())),
        tokens={
            name: median(len(getattr(p, f"{name}_ids")) for p in pairs) if pairs else 0.0
            for name in ("prefix", "chosen", "rejected")
        },
        model=runtime.model, tokenizer_hash=runtime.tokenizer_hash, policy_hash=runtime.policy.hash,
        detector=runtime.detector.version, judge=judge.version, judge_metrics=judge.metrics, settings=settings,
        settings_hash=settings.hash, pairs_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        sources_sha256=hashlib.sha256("\n".join(sorted({p.guard_id for p in pairs})).encode()).hexdigest(),
    )  # fmt: skip


def markdown(card: Card) -> str:
    """The card for people."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Nothing in a card was written by a client, and Markdown has no escaping to speak of.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["percent"] = _percent
    return environment.get_template("pairs.md.j2").render(card=card)


def _generations(spent: Counter[str], limit: int) -> Generations:
    total = sum(spent.values())
    return Generations(
        total=total, requests=len(spent), mean=total / len(spent) if spent else 0.0,
        most=max(spent.values(), default=0), limit=limit,
    )  # fmt: skip


def _percent(rate: Rate) -> str:
    return f"{rate.rate:.1%} [{rate.lo:.1%}, {rate.hi:.1%}], n = {rate.n}"
