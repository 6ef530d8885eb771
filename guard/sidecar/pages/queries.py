"""Questions that the pages ask of the store: rates by group, their course, one page of traces, the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, and_, case, cast, exists, func, literal, or_, select, tuple_

from classifiers.stats import Rate
from guard.store.reading import Filter
from guard.store.reviews import JUDGED, last_words
from guard.store.store import Store
from guard.store.tables import reviews, steps, traces
from guard.traces import Trace

GROUPS = {"policy": ("policy", "policy_hash"), "detector": ("detector",), "version": ("weights",), "mode": ("shadow",)}
"""What rates can be told apart by, and the columns of `traces` that say it."""
QUEUED = 2000
"""The review queue looks at so many traces, the newest: its cost does not grow with the store."""
TIMED = 10_000
"""Guard times are told of so many requests, the newest."""
PAGE = 50


@dataclass(frozen=True)
class Counts:
    """How many requests of a group there were, and of how many something is true."""

    key: tuple[str, ...]
    requests: int
    intervened: int
    unscored: int
    unclean: int
    interventions: int
    steps: int

    @property
    def rates(self) -> dict[str, Rate]:
        """The shares of requests, each with its 95 % interval."""
        found = {"intervened": self.intervened, "unscored": self.unscored, "unclean": self.unclean}
        return {name: Rate.of(k, self.requests) for name, k in found.items()}


def _flag(term: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((term, 1), else_=0)), 0)


_COUNTED = (
    func.count(), _flag(traces.c.interventions > 0), _flag(traces.c.unscored > 0), _flag(~traces.c.clean),
    func.coalesce(func.sum(traces.c.interventions), 0), func.coalesce(func.sum(traces.c.seen), 0),
)  # fmt: skip


def counts(store: Store, wanted: Filter, by: str | None = None) -> list[Counts]:
    """By group, the largest first; without `by` one row over all."""
    columns = [traces.c[name] for name in GROUPS[by]] if by else []
    chosen: list[ColumnElement[Any]] = [*columns, *_COUNTED]
    query = select(*chosen).where(wanted.clause()).group_by(*columns)
    with store.reading() as connection:
        rows = connection.execute(query).all()
    width = len(columns)
    found = [Counts(tuple(map(str, row[:width])), *map(int, row[width:])) for row in rows]
    return sorted(found, key=lambda each: (-each.requests, each.key))


def course(store: Store, wanted: Filter, since: float, until: float, parts: int) -> list[tuple[int, int]]:
    """Requests, and those with an intervention, in each of `parts` equal spans between two Unix times."""
    place = (traces.c.created - since) / ((until - since) / parts)
    # A cast cuts off in SQLite and rounds in Postgres.
    part = cast(func.floor(place) if store.engine.dialect.name == "postgresql" else place, Integer)
    within = and_(wanted.clause(), traces.c.created >= since, traces.c.created < until)
    query = select(part, func.count(), _flag(traces.c.interventions > 0)).where(within).group_by(part)
    found = [(0, 0)] * parts
    with store.reading() as connection:
        for number, requests, intervened in connection.execute(query):
            found[min(int(number), parts - 1)] = (int(requests), int(intervened))
    return found


def guard_times(store: Store, wanted: Filter) -> list[int]:
    """Microseconds that requests waited for the guard, the least first; of the newest `TIMED` that have kept them."""
    query = select(traces.c.guard_us).where(wanted.clause(), traces.c.guard_us.is_not(None))
    with store.reading() as connection:
        return sorted(connection.execute(query.order_by(traces.c.created.desc()).limit(TIMED)).scalars())


@dataclass(frozen=True)
class Listed:
    """One page of traces, the newest first."""

    traces: list[Trace]
    reviewed: dict[str, int]
    """Steps with a standing label, by guard id."""
    after: tuple[float, str] | None
    """Where the next page begins; None: there is none."""


def listed(store: Store, wanted: Filter, before: tuple[float, str] | None) -> Listed:
    """The page that comes after the trace `before`, told by its time and guard id."""
    key = tuple_(traces.c.created, traces.c.guard_id)
    query = select(traces.c.document).where(wanted.clause())
    if before is not None:
        query = query.where(key < tuple_(literal(before[0]), literal(before[1], traces.c.guard_id.type)))
    query = query.order_by(traces.c.created.desc(), traces.c.guard_id.desc()).limit(PAGE + 1)
    with store.reading() as connection:
        found = [Trace.model_validate_json(text) for text in connection.execute(query).scalars()]
        page = found[:PAGE]
        judged = (
            select(reviews.c.guard_id, func.count(reviews.c.step.distinct()))
            .where(reviews.c.guard_id.in_([each.guard_id for each in page]))
            .where(reviews.c.id.in_(last_words()), reviews.c.label.in_(JUDGED))
            .group_by(reviews.c.guard_id)
        )
        reviewed = {str(guard_id): int(n) for guard_id, n in connection.execute(judged)}
    more = len(found) > PAGE
    return Listed(page, reviewed, (page[-1].created, page[-1].guard_id) if more else None)


def distinct(store: Store, column: str, limit: int = 100) -> list[str]:
    """The values that a column of `traces` holds, in order."""
    query = select(traces.c[column]).where(~traces.c.probe).distinct().order_by(traces.c[column]).limit(limit)
    with store.reading() as connection:
        return list(connection.execute(query).scalars())


@dataclass(frozen=True)
class Waiting:
    """The step to ask about next, and how many wait."""

    guard_id: str
    step: int
    count: int


def next_step(store: Store, reviewer: str, threshold: float, tokenizer: str) -> Waiting | None:
    """The step whose score is nearest to the threshold in log-odds, of those that nobody has judged and this reviewer
    has not skipped; None when none waits.

    Only traces with their text count, written with the served model's `tokenizer` (its hash).
    """
    query = _waiting(reviewer, tokenizer)
    rows = query.subquery()
    sides = (
        query.where(steps.c.score >= threshold).order_by(steps.c.score, steps.c.guard_id, steps.c.index).limit(1),
        query.where(steps.c.score < threshold).order_by(steps.c.score.desc(), steps.c.guard_id, steps.c.index).limit(1),
    )
    with store.reading() as connection:
        found = [row for side in sides for row in connection.execute(side)]
        count = connection.execute(select(func.count()).select_from(rows)).scalar_one()
    if not found:
        return None
    guard_id, index, _ = min(found, key=lambda row: abs(_odds(row[2]) - _odds(threshold)))
    return Waiting(guard_id, index, count)


def _waiting(reviewer: str, tokenizer: str) -> Select[str, int, float]:
    newest = select(traces.c.guard_id).where(
        ~traces.c.probe, traces.c.log_content == "full", traces.c.tokenizer_hash == tokenizer
    ).order_by(traces.c.created.desc()).limit(QUEUED)  # fmt: skip
    said = exists().where(
        reviews.c.guard_id == steps.c.guard_id,
        reviews.c.step == steps.c.index,
        reviews.c.id.in_(last_words()),
        or_(reviews.c.label.in_(JUDGED), and_(reviews.c.label == "skip", reviews.c.reviewer == reviewer)),
    )
    return select(steps.c.guard_id, steps.c.index, steps.c.score).where(
        steps.c.guard_id.in_(newest), ~steps.c.injected, steps.c.score.is_not(None), ~said
    )


def _odds(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))
