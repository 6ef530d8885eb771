"""One guarded request as an adapter keeps it, and the loop in which both adapters read tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.engine.session import EngineGuard, GuardedRequest


@dataclass
class Row:
    """A request, its output ids so far, and how many of them the guard has read."""

    request: GuardedRequest
    tokens: list[int]
    read: int = 0

    def advance(self) -> bool:
        """Observes until a step is pending (True) or the tokens are used up (False)."""
        tokens = self.tokens
        while self.read < len(tokens):
            token = tokens[self.read]
            self.read += 1
            if self.request.observe(token):
                return True
        return False


def read(guard: EngineGuard, rows: Iterable[Row]) -> None:
    """Feeds new tokens; a row whose step is pending waits for the round's batch of scores, then reads on."""
    busy = [row for row in rows if row.read < len(row.tokens)]
    while busy:
        waiting = [row for row in busy if row.advance()]
        guard.score([row.request for row in waiting])
        busy = [row for row in waiting if row.read < len(row.tokens)]


def finish(guard: EngineGuard, row: Row) -> None:
    """The request has left the batch: reads its last tokens and writes its trace."""
    read(guard, [row])
    guard.close(row.request, row.tokens)
