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
from guard.store import reviews
from guard.store.reading import ALL, Filter, pages
from guard.store.store import Store
from guard.store.tables import traces
from guard.traces import Trace

_STEP = pa.struct(
    {
        "start": pa.int64(), "end": pa.int64(), "zone": pa.string(), "score": pa.float64(), "cue": pa.bool_(),
        "injected": pa.bool_(), "unreadable": pa.bool_(),
    }
)  # fmt: skip
_INTERVENTION = pa.struct(
    {
        "step": pa.int64(), "at": pa.int64(), "trigger_id": pa.string(), "rung": pa.string(), "mode": pa.string(),
        "cue_ids": pa.list_(pa.int64()), "score": pa.float64(), "forced": pa.int64(), "completed": pa.bool_(),
    }
)  # fmt: skip
_REVIEW = pa.struct(
    {
        "step": pa.int64(), "label": pa.string(), "reviewer": pa.string(), "created": pa.float64(), "note": pa.string(),
    }
)  # fmt: skip
SCHEMA = pa.schema(
    {
        "guard_id": pa.string(), "created": pa.float64(), "model": pa.string(), "weights": pa.string(),
        "tenant": pa.string(), "tokenizer_hash": pa.string(), "log_content": pa.string(), "request": pa.string(),
        "prompt_ids": pa.list_(pa.int64()), "output_ids": pa.list_(pa.int64()), "prompt_tokens": pa.int64(),
        "output_tokens": pa.int64(), "policy": pa.string(), "policy_hash": pa.string(), "detector": pa.string(),
        "engine": pa.string(), "shadow": pa.bool_(), "clean": pa.bool_(), "seen": pa.int64(), "scored": pa.int64(),
        "unscored": pa.int64(), "unreadable": pa.int64(), "injected_tokens": pa.int64(),
        "replaced_tokens": pa.int64(), "enforcement_failed": pa.int64(), "errors": pa.list_(pa.string()),
        "steps": pa.list_(_STEP), "interventions": pa.list_(_INTERVENTION), "reviews": pa.list_(_REVIEW),
    }
)  # fmt: skip
"""Times are Unix seconds, token places are indices of `output_ids`, scores are probabilities."""


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
    return [
        {
            **trace.model_dump(exclude={"receipt"}),
            **trace.receipt.model_dump(),
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
            "replaced_tokens": trace.replaced_tokens,
            "clean": trace.receipt.clean,
            "reviews": said.get(trace.guard_id, []),
        }
        for trace in page
    ]


def _clean(review: dict[str, Any]) -> dict[str, Any]:
    """Parquet's strings are UTF-8: lone surrogates, which a reviewer's note can hold, become question marks."""
    return {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in review.items()}
