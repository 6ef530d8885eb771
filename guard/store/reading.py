"""Traces out of the store, page by page: memory holds one page, and no transaction outlives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, select, tuple_

from guard.store.store import Store
from guard.store.tables import spool_files, traces
from guard.traces import Trace

PAGE = 64


@dataclass(frozen=True)
class Filter:
    """Which traces; what is None does not matter."""

    since: float | None = None
    """Unix time of the first that counts."""
    until: float | None = None
    """Unix time of the first that no longer counts."""
    policy_hash: str | None = None
    weights: str | None = None
    tenant: str | None = None
    intervened: bool = False
    """Only those with an intervention."""
    unscored: bool = False
    """Only those with a step that was not scored."""
    shadow: bool | None = None
    """Only those that the guard forced nothing in, or only the others."""

    def clause(self) -> ColumnElement[bool]:
        """As a condition on `traces`; proofs of life never count."""
        terms: list[ColumnElement[bool]] = [~traces.c.probe]
        if self.since is not None:
            terms.append(traces.c.created >= self.since)
        if self.until is not None:
            terms.append(traces.c.created < self.until)
        for name in ("policy_hash", "weights", "tenant"):
            if (value := getattr(self, name)) is not None:
                terms.append(traces.c[name] == value)
        if self.intervened:
            terms.append(traces.c.interventions > 0)
        if self.unscored:
            terms.append(traces.c.unscored > 0)
        if self.shadow is not None:
            terms.append(traces.c.shadow if self.shadow else ~traces.c.shadow)
        return and_(*terms)


ALL = Filter()


def count(store: Store, wanted: Filter = ALL) -> int:
    """How many traces there are."""
    with store.reading() as connection:
        return connection.execute(select(func.count()).select_from(traces).where(wanted.clause())).scalar_one()


def find(store: Store, guard_id: str) -> Trace | None:
    """One trace, or None; a proof of life too."""
    with store.reading() as connection:
        document = connection.execute(select(traces.c.document).where(traces.c.guard_id == guard_id)).scalar()
    return None if document is None else Trace.model_validate_json(document)


def read(store: Store, wanted: Filter = ALL) -> Iterator[Trace]:
    """All traces in the order of their time. What is written meanwhile may or may not be among them."""
    for page in pages(store, select(traces.c.document).where(wanted.clause())):
        for row in page:
            yield Trace.model_validate_json(row.document)


def newest(store: Store, limit: int, wanted: Filter = ALL) -> list[Trace]:
    """The last traces, the newest at the end."""
    query = select(traces.c.document).where(wanted.clause())
    query = query.order_by(traces.c.created.desc(), traces.c.guard_id.desc()).limit(limit)
    with store.reading() as connection:
        found = connection.execute(query).scalars().all()
    return [Trace.model_validate_json(document) for document in reversed(found)]


def pages(store: Store, query: Select[Any]) -> Iterator[list[Row[Any]]]:
    """A query on `traces` in pages, by time and guard id."""
    key = tuple_(traces.c.created, traces.c.guard_id)
    query = query.add_columns(traces.c.created, traces.c.guard_id).order_by(traces.c.created, traces.c.guard_id)
    page: list[Row[Any]] = []
    while True:
        after = query
        if page:
            last = literal(page[-1].created), literal(page[-1].guard_id, traces.c.guard_id.type)
            after = query.where(key > tuple_(*last))
        with store.reading() as connection:
            page = list(connection.execute(after.limit(PAGE)).all())
        if not page:
            return
        yield page


def damage(store: Store) -> tuple[int, int]:
    """How many spool files were read, and how many lines of them were malformed."""
    with store.reading() as connection:
        query = select(func.count(), func.coalesce(func.sum(spool_files.c.malformed), 0))
        files, malformed = connection.execute(query).one()
    return int(files), int(malformed)
