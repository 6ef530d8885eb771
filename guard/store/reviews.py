"""What people said about steps: by whom and when, nothing overwritten; the newest word on a step counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import select

from guard.errors import UserError
from guard.store.store import Store
from guard.store.tables import reviews, steps, traces

Label = Literal["cue", "not_cue", "missed"]
"""`cue` and `not_cue` confirm or deny what the guard said of a step; `missed`: a cue that it did not see."""


@dataclass(frozen=True)
class Review:
    """One label on one step of one trace."""

    guard_id: str
    step: int | None
    """Index in the trace's steps; None: the trace as a whole."""
    label: Label
    reviewer: str
    created: float
    """Unix time in seconds."""
    note: str = ""


def add(
    store: Store, guard_id: str, step: int | None, label: Label, reviewer: str, note: str = "", now: float | None = None
) -> Review:
    """Keeps a label. UserError when there is no such label, trace or step."""
    if label not in get_args(Label):
        raise UserError("A review's label", got=label, wanted=", ".join(get_args(Label)))
    review = Review(guard_id, step, label, reviewer, time.time() if now is None else now, note)
    if step is None:
        there = select(traces.c.guard_id).where(traces.c.guard_id == guard_id)
    else:
        there = select(steps.c.guard_id).where(steps.c.guard_id == guard_id, steps.c.index == step)
    with store.writing() as connection:
        if connection.execute(there).first() is None:
            what = f"trace {guard_id}" if step is None else f"step {step} of trace {guard_id}"
            raise UserError(f"{store} has no {what}")
        connection.execute(reviews.insert().values(**vars(review)))
    return review


def of_traces(store: Store, guard_ids: Sequence[str]) -> list[Review]:
    """Everything that was said about some traces, the oldest first."""
    columns = [reviews.c[name] for name in Review.__dataclass_fields__]
    query = select(*columns).where(reviews.c.guard_id.in_(guard_ids)).order_by(reviews.c.created, reviews.c.id)
    with store.reading() as connection:
        return [Review(*row) for row in connection.execute(query)]
