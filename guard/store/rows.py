"""A trace as rows of the store's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table

from guard.store.tables import interventions, steps, traces
from guard.traces import Trace

PROBE_ID = "probe-"
"""How the guard ids of proofs of life begin; clients cannot choose theirs."""


@dataclass(frozen=True)
class Version:
    """One line of the spool: a trace, and where its line begins."""

    file: str
    at: int
    text: str
    trace: Trace


def trace_row(version: Version) -> dict[str, Any]:
    """The row in `traces`."""
    trace, receipt = version.trace, version.trace.receipt
    return {
        **_columns(receipt, traces),
        **_columns(trace, traces),
        "file": version.file,
        "at": version.at,
        "probe": trace.guard_id.startswith(PROBE_ID),
        "interventions": len(receipt.interventions),
        "document": version.text,
    }


def step_rows(trace: Trace) -> list[dict[str, Any]]:
    """The rows in `steps`."""
    return _listed(trace.guard_id, trace.steps, steps)


def intervention_rows(trace: Trace) -> list[dict[str, Any]]:
    """The rows in `interventions`."""
    return _listed(trace.guard_id, trace.receipt.interventions, interventions)


def _listed(guard_id: str, parts: list[Any], table: Table) -> list[dict[str, Any]]:
    return [{"guard_id": guard_id, "index": index, **_columns(part, table)} for index, part in enumerate(parts)]


def _columns(part: object, table: Table) -> dict[str, Any]:
    """What the table has a column for."""
    return {column.name: getattr(part, column.name) for column in table.c if hasattr(part, column.name)}
