"""What is too old goes: traces with their reviews, or only their content, and the spool's files behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, update

from guard.store.spool import files, identity, is_read, last_moment
from guard.store.store import Store
from guard.store.tables import spool_files, traces
from guard.traces import Trace

_BATCH = 64
Tick = Callable[[int], object]


def count_old(store: Store, cutoff: float, content: bool) -> int:
    """How many traces from before a Unix time `prune` would change."""
    with store.reading() as connection:
        return connection.execute(select(func.count()).select_from(traces).where(_old(cutoff, content))).scalar_one()


@dataclass
class Pruned:
    """What `prune_files` did."""

    deleted: int = 0
    waiting: int = 0
    """Old files that the store has not read to their end; they stay."""


def prune(store: Store, cutoff: float, tick: Tick = lambda count: None) -> int:
    """Deletes the traces from before a Unix time, reviews included; returns how many."""
    done = 0
    while True:
        with store.writing() as connection:
            old = connection.execute(select(traces.c.guard_id).where(_old(cutoff, False)).limit(_BATCH)).scalars().all()
            connection.execute(delete(traces).where(traces.c.guard_id.in_(old)))
        if not old:
            _truncate_log(store)
            return done
        done += len(old)
        tick(len(old))


def prune_content(store: Store, cutoff: float, tick: Tick = lambda count: None) -> int:
    """Takes request and token ids out of the traces from before a Unix time; receipts, steps and reviews stay."""
    change = update(traces).where(traces.c.guard_id == bindparam("key"))
    done = 0
    while True:
        with store.writing() as connection:
            old = connection.execute(select(traces.c.document).where(_old(cutoff, True)).limit(_BATCH)).scalars()
            bare = [Trace.model_validate_json(document).keeping("none") for document in old]
            if bare:
                connection.execute(
                    change.values(log_content="none", document=bindparam("text")),
                    [{"key": trace.guard_id, "text": trace.model_dump_json()} for trace in bare],
                )
        if not bare:
            _truncate_log(store)
            return done
        done += len(bare)
        tick(len(bare))


def prune_files(store: Store, directory: Path, cutoff: float) -> Pruned:
    """Deletes the spool files that ended before a Unix time, if the store has read them to their end."""
    pruned = Pruned()
    for path in files(directory):
        if last_moment(path) > cutoff:
            continue
        with path.open("rb") as source:
            known = identity(source)
            with store.reading() as connection:
                place = select(spool_files.c.offset).where(spool_files.c.id == known)
                offset = connection.execute(place).scalar()
            read = known is None or (offset is not None and is_read(source, offset))
        if not read:
            pruned.waiting += 1
            continue
        path.unlink(missing_ok=True)
        pruned.deleted += 1
        with store.writing() as connection:
            connection.execute(delete(spool_files).where(spool_files.c.id == known))
    return pruned


def _old(cutoff: float, content: bool) -> ColumnElement[bool]:
    old = traces.c.created < cutoff
    return and_(old, traces.c.log_content != "none") if content else old


def _truncate_log(store: Store) -> None:
    """SQLite keeps what was deleted in its log until that is written over."""
    if store.engine.dialect.name == "sqlite":
        connection = store.engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
