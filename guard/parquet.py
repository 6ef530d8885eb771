"""A trace as a row of Parquet and back: the one shape that the store exports and that the aligner reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from guard.traces import Lengths, Receipt, Trace

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
_TIME = pa.struct({"request": pa.int64(), "steps": pa.list_(pa.int64())})
SCHEMA = pa.schema(
    {
        "guard_id": pa.string(), "created": pa.float64(), "model": pa.string(), "weights": pa.string(),
        "tenant": pa.string(), "tokenizer_hash": pa.string(), "log_content": pa.string(), "request": pa.string(),
        "prompt_ids": pa.list_(pa.int64()), "output_ids": pa.list_(pa.int64()), "prompt_tokens": pa.int64(),
        "output_tokens": pa.int64(), "policy": pa.string(), "policy_hash": pa.string(), "detector": pa.string(),
        "engine": pa.string(), "shadow": pa.bool_(), "clean": pa.bool_(), "seen": pa.int64(), "scored": pa.int64(),
        "unscored": pa.int64(), "unreadable": pa.int64(), "injected_tokens": pa.int64(),
        "replaced_tokens": pa.int64(), "enforcement_failed": pa.int64(), "errors": pa.list_(pa.string()),
        "steps": pa.list_(_STEP), "interventions": pa.list_(_INTERVENTION), "guard_time": _TIME,
        "reviews": pa.list_(_REVIEW),
    }
)  # fmt: skip
"""Times are Unix seconds (`guard_time`: microseconds), token places are indices of `output_ids`, scores are
probabilities."""


def trace_row(trace: Trace, reviews: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The row of a trace and of what reviewers said about it."""
    return {
        **trace.model_dump(exclude={"receipt"}),
        **trace.receipt.model_dump(),
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
        "replaced_tokens": trace.replaced_tokens,
        "clean": trace.receipt.clean,
        "reviews": list(reviews),
    }


def trace_of(row: dict[str, Any]) -> Trace:
    """The trace of a row, whose columns may be fewer than the schema's where they have defaults.

    ValueError (pydantic's), KeyError or TypeError when it is none.
    """
    own = {name: row[name] for name in Trace.model_fields if name in row}
    own["receipt"] = {name: row[name] for name in Receipt.model_fields if name in row}
    if row.get("log_content") == "none":
        own["lengths"] = Lengths(
            prompt=row["prompt_tokens"], output=row["output_tokens"], replaced=row["replaced_tokens"]
        )
    return Trace.model_validate(own)
