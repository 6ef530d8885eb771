"""What was in force when a run began, and whether it still is: a run takes hours, and people roll back meanwhile."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align.gate import Check
from align.versions import Event, history
from guard.weights import Registry


class Standing(BaseModel):
    """`OUT/began.json`, so that an interrupted run is held to it too."""

    model_config = ConfigDict(extra="forbid")

    version: int
    """In force when the run began."""
    moves: int
    """How often that had changed until then."""


def began(registry: Registry, out: Path) -> Standing:
    """What was in force when the run in `out` began: now, unless it was interrupted. Read without the registry's lock:
    a change at this moment counts as one since the beginning."""
    path = out / "began.json"
    if not path.exists():
        found = Standing(version=registry.current(), moves=len(_moves(registry)))
        scratch = path.with_suffix(".part")
        scratch.write_text(found.model_dump_json(), encoding="utf-8")
        scratch.replace(path)
    return Standing.model_validate_json(path.read_bytes())


def unmoved(registry: Registry, then: Standing, run: str) -> Check:
    """Whether what is in force is still what was then. A promotion of the run itself is no change: a crash came after
    it."""
    now = registry.current()
    others = [event.event for event in _moves(registry)[then.moves :] if event.run != run]
    return Check(
        figure="version in force", wanted=f"{then.version} from the run's beginning on",
        got=f"{now}{f', {others[-1]} meanwhile' if others else ''}", passed=not others and now == then.version,
    )  # fmt: skip


def _moves(registry: Registry) -> list[Event]:
    return [event for event in history(registry) if event.version is not None]
