"""Traces to store, and everything a store holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select

from guard.store.store import Store
from guard.store.tables import interventions, spool_files, steps, traces
from guard.traces import GuardTime, Trace
from tests.guard.test_traces import make

TABLES = (traces, steps, interventions, spool_files)


def variant(guard_id: str, number: int = 0) -> Trace:
    """One of many different traces with a guard id: with `number` its text, its ids and its steps change."""
    trace = make(guard_id, request=f"request {number}\0\n")
    trace.output_ids = [number, *trace.output_ids]
    trace.created = 100.0 + number
    trace.guard_time = GuardTime(request=number, steps=[number, 2]) if number % 2 else None
    trace.steps = trace.steps[: 1 + number % 2]
    trace.receipt.interventions = trace.receipt.interventions[: number % 2]
    return trace


def spooled(items: Iterable[Trace | bytes]) -> bytes:
    """A spool file's bytes; bytes among the items are lines as they are."""
    return b"".join(item if isinstance(item, bytes) else item.model_dump_json().encode() + b"\n" for item in items)


def write(directory: Path, items: Sequence[Trace | bytes], name: str = "spool-20260101-1.jsonl") -> Path:
    """Writes a whole spool file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_bytes(spooled(items))
    return path


def dump(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table that the spool feeds."""
    with store.reading() as connection:
        return {
            table.name: [
                dict(row._mapping) for row in connection.execute(select(table).order_by(*table.primary_key.columns))
            ]
            for table in TABLES
        }


def documents(store: Store) -> dict[str, Trace]:
    """The traces as they read back."""
    return {row["guard_id"]: Trace.model_validate_json(row["document"]) for row in dump(store)["traces"]}
