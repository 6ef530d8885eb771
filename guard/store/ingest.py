"""From the spool into the store: by offset, one transaction a batch, the same result however often and in what order.

The row of `spool_files` that holds a file's offset is locked while a batch is written, and the offset moves in the same
transaction: whoever is killed leaves the batch undone, and of two that feed one file the second reads on where the
first has stopped. Of two lines with one guard id the later in the spool holds, whichever comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Connection, delete, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError

from guard.store.rows import Version, intervention_rows, step_rows, trace_row
from guard.store.spool import Line, holds, identity, is_read, lines, sizes
from guard.store.store import Store
from guard.store.tables import interventions, spool_files, steps, traces
from guard.traces import Trace

#: A transaction takes at most so many lines and about so many bytes, so that nobody waits long for it.
BATCH_LINES = 64
BATCH_BYTES = 4 * 1024 * 1024
_MAY_BE_ROWS_FAULT = (StatementError, OverflowError, ValueError)
#: Postgres indexes no text that is much longer (2,704 bytes).
_MAX_KEY = 500


@dataclass
class Fed:
    """What was taken from the spool."""

    lines: int = 0
    traces: int = 0
    """Lines that the store holds now; those that a later line had replaced already are not among them."""
    malformed: int = 0
    """Lines that were no trace, or one that no database takes."""

    def add(self, other: Fed) -> None:
        """Counts another batch in."""
        self.lines += other.lines
        self.traces += other.traces
        self.malformed += other.malformed


@dataclass
class _Seen:
    """A file as it was left: nothing is asked of the database until it has grown."""

    size: int
    offset: int


@dataclass
class Ingester:
    """Feeds one store from one spool directory; many may feed it at once, from the same directory or others."""

    store: Store
    directory: Path
    batch_lines: int = BATCH_LINES
    _seen: dict[Path, _Seen] = field(default_factory=dict)

    def step(self) -> Fed | None:
        """Takes one batch, of the first file that has news; None when there is nothing new."""
        for path, size in sizes(self.directory).items():
            seen = self._seen.get(path)
            if seen is not None and seen.size == size:
                continue
            try:
                with path.open("rb") as source:
                    fed = self._take(path, source, size)
            except FileNotFoundError:
                continue
            if fed.lines:
                return fed
        return None

    def run(self) -> Fed:
        """Takes all there is."""
        total = Fed()
        while (fed := self.step()) is not None:
            total.add(fed)
        return total

    def behind(self) -> int:
        """Bytes of the spool that the store does not hold yet, as far as is known; a line under way counts."""
        read = {path: seen.offset for path, seen in self._seen.items()}
        return sum(max(0, size - read.get(path, 0)) for path, size in sizes(self.directory).items())

    def _take(self, path: Path, source: BinaryIO, size: int) -> Fed:
        known = identity(source)
        if known is None:
            self._seen[path] = _Seen(size, 0)
            return Fed()
        with self.store.writing() as connection:
            offset = _locked_offset(connection, known, path.name, source)
            batch = _batch(source, offset, self.batch_lines)
            fed, end = Fed(), offset
            if batch:
                end = batch[-1].end
                fed = _write(connection, path.name, batch)
                _advance(connection, known, batch[-1], fed.malformed)
        # A file that still holds whole lines is looked at again, whether it grows or not.
        self._seen[path] = _Seen(size if is_read(source, end) else -1, end)
        return fed


def _insert(connection: Connection) -> type[postgresql.Insert] | type[sqlite.Insert]:
    return postgresql.Insert if connection.dialect.name == "postgresql" else sqlite.Insert


def _locked_offset(connection: Connection, known: str, name: str, source: BinaryIO) -> int:
    """Where to read on. The row stays locked until the transaction ends."""
    first = {"id": known, "name": name, "offset": 0, "last_at": 0, "last_hash": "", "malformed": 0}
    connection.execute(_insert(connection)(spool_files).values(first).on_conflict_do_nothing())
    row = connection.execute(select(spool_files).where(spool_files.c.id == known).with_for_update()).one()
    if row.offset == 0 or holds(source, row.last_at, row.offset, row.last_hash):
        return int(row.offset)
    # Cut or written anew behind its first trace.
    connection.execute(update(spool_files).where(spool_files.c.id == known).values(offset=0, malformed=0))
    return 0


def _batch(source: BinaryIO, offset: int, most: int) -> list[Line]:
    found: list[Line] = []
    for line in lines(source, offset):
        found.append(line)
        if len(found) == most or line.end - offset >= BATCH_BYTES:
            break
    return found


def _advance(connection: Connection, known: str, last: Line, malformed: int) -> None:
    place = {"offset": last.end, "last_at": last.at, "last_hash": last.hash}
    total = spool_files.c.malformed + malformed
    connection.execute(update(spool_files).where(spool_files.c.id == known).values(**place, malformed=total))


def _write(connection: Connection, name: str, batch: list[Line]) -> Fed:
    good = {}
    damaged = 0
    for line in batch:
        if line.trace is not None and _fits(line.trace):
            good[line.trace.guard_id] = Version(name, line.at, line.text.decode(), line.trace)
        else:
            damaged += not line.blank
    # In one order everywhere, so that two that write the same traces never wait for each other in a circle.
    newest = [good[guard_id] for guard_id in sorted(good)]
    try:
        with connection.begin_nested():
            written, refused = _upsert(connection, newest), 0
    except _MAY_BE_ROWS_FAULT as error:
        if not _is_rows_fault(error):
            raise
        written, refused = _one_by_one(connection, newest)
    return Fed(lines=len(batch), traces=written, malformed=damaged + refused)


def _fits(trace: Trace) -> bool:
    keys = (trace.guard_id, trace.receipt.policy_hash, trace.weights, trace.tenant)
    return math.isfinite(trace.created) and max(map(len, keys)) <= _MAX_KEY


def _is_rows_fault(error: Exception) -> bool:
    """Whether another row could be written; any other failure is the database's, and what was read waits."""
    return not isinstance(error, DBAPIError) or isinstance(error, DataError | IntegrityError)


def _one_by_one(connection: Connection, versions: list[Version]) -> tuple[int, int]:
    written = refused = 0
    for version in versions:
        try:
            with connection.begin_nested():
                written += _upsert(connection, [version])
        except _MAY_BE_ROWS_FAULT as error:
            if not _is_rows_fault(error):
                raise
            refused += 1
    return written, refused


def _upsert(connection: Connection, versions: list[Version]) -> int:
    """Writes those that are later in the spool than what the store holds; returns how many."""
    if not versions:
        return 0
    insert = _insert(connection)(traces)
    new = insert.excluded
    later = tuple_(new.file, new.at) > tuple_(traces.c.file, traces.c.at)
    changes = {column.name: new[column.name] for column in traces.c if not column.primary_key}
    statement = insert.on_conflict_do_update(index_elements=[traces.c.guard_id], set_=changes, where=later)
    rows = [trace_row(version) for version in versions]
    written = set(connection.execute(statement.returning(traces.c.guard_id), rows).scalars())
    for table, parts in ((steps, step_rows), (interventions, intervention_rows)):
        connection.execute(delete(table).where(table.c.guard_id.in_(written)))
        fresh = [row for version in versions if version.trace.guard_id in written for row in parts(version.trace)]
        if fresh:
            connection.execute(_insert(connection)(table), fresh)
    return len(written)
