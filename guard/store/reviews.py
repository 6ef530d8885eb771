"""What people said about steps and requests: by whom and when, nothing overwritten.

A person's last word on a step is what they say of it; `undone` takes it back. Of several people's, the newest counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import Connection, Select, func, select

from guard.errors import UserError
from guard.store.store import Store
from guard.store.tables import reviews, steps, traces

StepLabel = Literal["cue", "not_cue", "missed", "skip"]
"""`cue` and `not_cue` confirm or deny what the guard said of a step; `missed`: a cue that it did not see; `skip`: its
reviewer could not tell."""
KindLabel = Literal["harmful", "benign", "alarming"]
"""What a whole trace's request is: harmful, harmless, or harmless though it sounds harmful."""
Label = Literal["cue", "not_cue", "missed", "skip", "harmful", "benign", "alarming", "undone"]
JUDGED: tuple[Label, ...] = ("cue", "not_cue", "missed")
"""Labels that say what a step is."""


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


_COLUMNS = [reviews.c[name] for name in Review.__dataclass_fields__]


def add(
    store: Store, guard_id: str, step: int | None, label: Label, reviewer: str, note: str = "", now: float | None = None
) -> Review:
    """Keeps a label, unless it is its reviewer's last word on the step already: said twice is said once.

    Returns what the store holds. UserError when there is no such label, trace or step.
    """
    if label not in get_args(Label):
        raise UserError("A review's label", got=label, wanted=", ".join(get_args(Label)))
    review = Review(guard_id, step, label, reviewer, time.time() if now is None else now, note)
    with store.writing() as connection:
        _check(connection, store, guard_id, step)
        mine = select(*_COLUMNS).where(
            reviews.c.guard_id == guard_id, reviews.c.step.is_not_distinct_from(step), reviews.c.reviewer == reviewer
        )
        last = connection.execute(mine.order_by(reviews.c.id.desc()).limit(1)).first()
        if last is not None and (last.label, last.note) == (label, note):
            return Review(*last)
        connection.execute(reviews.insert().values(**vars(review)))
    return review


def undo(store: Store, reviewer: str, review_id: int) -> Review | None:
    """Takes back one of a reviewer's own labels; None when it is not their last word on its step, or undone already."""
    with store.writing() as connection:
        found = connection.execute(
            select(*_COLUMNS).where(
                reviews.c.id == review_id, reviews.c.reviewer == reviewer, reviews.c.id.in_(last_words()),
                reviews.c.label != "undone",
            )
        ).first()  # fmt: skip
        if found is None:
            return None
        taken = Review(*found)
        _check(connection, store, taken.guard_id, taken.step)
        again = {**vars(taken), "label": "undone", "created": time.time(), "note": ""}
        connection.execute(reviews.insert().values(**again))
    return taken


def last_of(store: Store, reviewer: str) -> tuple[int, Review] | None:
    """The id of the newest label that a reviewer can still undo, and the label."""
    query = select(reviews.c.id, *_COLUMNS).where(
        reviews.c.reviewer == reviewer, reviews.c.id.in_(last_words()), reviews.c.label != "undone"
    )
    with store.reading() as connection:
        row = connection.execute(query.order_by(reviews.c.id.desc()).limit(1)).first()
    return None if row is None else (row[0], Review(*row[1:]))


def of_traces(store: Store, guard_ids: Sequence[str]) -> list[Review]:
    """Everything that was said about some traces, the oldest first."""
    query = select(*_COLUMNS).where(reviews.c.guard_id.in_(guard_ids)).order_by(reviews.c.created, reviews.c.id)
    with store.reading() as connection:
        return [Review(*row) for row in connection.execute(query)]


def standing(store: Store, guard_ids: Sequence[str]) -> list[Review]:
    """Everybody's last word on each step of some traces, what was undone left out, the oldest first."""
    query = select(*_COLUMNS).where(
        reviews.c.guard_id.in_(guard_ids), reviews.c.id.in_(last_words()), reviews.c.label != "undone"
    )
    with store.reading() as connection:
        return [Review(*row) for row in connection.execute(query.order_by(reviews.c.id))]


def reviewed_traces(store: Store) -> list[str]:
    """Guard ids of the traces with a step that was judged."""
    query = select(reviews.c.guard_id).where(reviews.c.id.in_(last_words()), reviews.c.label.in_(JUDGED)).distinct()
    with store.reading() as connection:
        return list(connection.execute(query.order_by(reviews.c.guard_id)).scalars())


def last_words() -> Select[int]:
    """Ids of everybody's last word on each step, `undone` included."""
    return select(func.max(reviews.c.id)).group_by(reviews.c.guard_id, reviews.c.step, reviews.c.reviewer)


def _check(connection: Connection, store: Store, guard_id: str, step: int | None) -> None:
    """The trace's row stays locked: of two that say the same at once the second finds it said."""
    there = select(traces.c.guard_id).where(traces.c.guard_id == guard_id).with_for_update()
    if connection.execute(there).first() is None:
        raise UserError(f"{store} has no trace {guard_id}")
    if step is None:
        return
    known = select(steps.c.index).where(steps.c.guard_id == guard_id, steps.c.index == step)
    if connection.execute(known).first() is None:
        raise UserError(f"{store} has no step {step} of trace {guard_id}")
