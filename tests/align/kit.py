"""Parts that the tests of pairs share: traces and sources without an engine, and a pool of one-token triggers."""

from __future__ import annotations

from typing import Any

from align.sources import Source
from guard.traces import Intervention, Receipt, StepRecord, Trace
from guard.triggers import POOL, EncodedTrigger

#: Trigger i is token 1000 + i after a word, 2000 + i after white space.
ENCODED = [EncodedTrigger(t.id, t.text, (1000 + i,), (2000 + i,), (3000 + i,), t.strong) for i, t in enumerate(POOL)]


def trace(guard_id: str, *, cue: bool, answered: bool = True, **changes: Any) -> Trace:
    """Ten output ids 10..19 in two steps of three; the second may be a cue, answered by an intervention or not."""
    steps = [
        StepRecord(start=0, end=3, zone="reasoning", score=0.1, cue=False),
        StepRecord(start=3, end=6, zone="reasoning", score=0.9, cue=cue),
    ]
    given = [Intervention(step=1, at=6, trigger_id="danger", score=0.9)] if cue and answered else []
    receipt = Receipt(
        guard_id=guard_id, policy="p", policy_hash="hash", detector="det", engine="e", interventions=given
    )  # fmt: skip
    fields: dict[str, Any] = {
        "guard_id": guard_id, "created": 1.0, "model": "m", "tokenizer_hash": "t", "request": f"r-{guard_id}",
        "prompt_ids": [1, 2], "output_ids": list(range(10, 20)), "steps": steps, "receipt": receipt,
    }  # fmt: skip
    return Trace.model_validate(fields | changes)


def source(name: str = "s", **changes: Any) -> Source:
    """An intervened source of a trace: prefix 10..12, cue 13..15."""
    fields: dict[str, Any] = {
        "id": name, "origin": "trace", "kind": "intervened", "tenant": "", "request": f"r-{name}", "prompt_ids": [1, 2],
        "prefix": [10, 11, 12], "own": [13, 14, 15], "whole": False, "policy_hash": "hash", "detector": "det",
    }  # fmt: skip
    return Source.model_validate(fields | changes)
