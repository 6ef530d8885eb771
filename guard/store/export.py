"""The store as a Parquet file: one row a trace, written page by page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import select

from guard.errors import UserError
from guard.parquet import SCHEMA, trace_row
from guard.store import reviews
from guard.store.reading import ALL, Filter, pages
from guard.store.store import Store
from guard.store.tables import traces
from guard.traces import Trace


def export(store: Store, out: Path, wanted: Filter = ALL, tick: Callable[[int], object] = lambda count: None) -> int:
    """Writes the traces to `out` and returns how many; a page of them is a row group. UserError when it cannot."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    written = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(scratch, SCHEMA, compression="zstd") as writer:
            os.chmod(scratch, 0o600)
            for page in pages(store, select(traces.c.document).where(wanted.clause())):
                rows = _rows(store, [Trace.model_validate_json(row.document) for row in page])
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                written += len(rows)
                tick(len(rows))
        scratch.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written", got=error.strerror or str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return written


def _rows(store: Store, page: list[Trace]) -> list[dict[str, Any]]:
    said: dict[str, list[dict[str, Any]]] = {}
    for review in reviews.of_traces(store, [trace.guard_id for trace in page]):
        said.setdefault(review.guard_id, []).append(_clean(dataclasses.asdict(review)))
    return [trace_row(trace, said.get(trace.guard_id, [])) for trace in page]


def _clean(review: dict[str, Any]) -> dict[str, Any]:
    """Parquet's strings are UTF-8: lone surrogates, which a reviewer's note can hold, become question marks."""
    return {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in review.items()}
