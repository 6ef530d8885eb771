"""One guarded request as an adapter keeps it, and the loop in which both adapters read tokens.

A quiet token, which can neither end a step nor change a zone, is left aside: one look-up. The monitor takes it with the
next token that is not quiet, or when the step is full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.engine.session import EngineGuard, GuardedRequest


@dataclass(slots=True)
class Row:
    """A request and its output ids so far."""

    request: GuardedRequest
    tokens: list[int]
    read: int = 0
    """How many of them the monitor has taken."""
    seen: int = 0
    """How many have been looked at; those after `read` are quiet."""
    room: int = 0
    """How many more quiet ones may be left aside. Above 0, nothing is forced."""

    def advance(self) -> bool:
        """Observes until a step is pending (True) or the tokens are used up (False)."""
        self.catch_up()
        tokens, request = self.tokens, self.request
        while self.read < len(tokens):
            token = tokens[self.read]
            self.read += 1
            if request.observe(token):
                return True
        return False

    def catch_up(self) -> None:
        """The monitor takes what was left aside."""
        if self.seen > self.read:
            self.request.pass_quiet(self.tokens[self.read : self.seen])
            self.read = self.seen


def read(guard: EngineGuard, rows: Iterable[Row]) -> None:
    """Looks at new tokens; a row whose step is pending waits for the round's batch of scores, then reads on."""
    loud = guard.loud
    size = len(loud)
    news = []
    for row in rows:
        tokens = row.tokens
        count = len(tokens)
        if count == row.seen:
            continue
        if row.room and count == row.seen + 1 and 0 <= (token := tokens[-1]) < size and not loud[token]:
            row.seen = count
            row.room -= 1
        else:
            news.append(row)
    busy = news
    while busy:
        waiting = [row for row in busy if row.advance()]
        if waiting:
            guard.score([row.request for row in waiting])
        busy = [row for row in waiting if row.read < len(row.tokens)]
    for row in news:
        row.seen, row.room = row.read, row.request.room


def finish(guard: EngineGuard, row: Row) -> None:
    """The request has left the batch: reads its last tokens and writes its trace.

    Under async scheduling the runner shows -1 for what it sampled last: no one has read that token, and nothing can
    be forced after it.
    """
    known = len(row.tokens)
    while known > row.seen and row.tokens[known - 1] < 0:
        known -= 1
    row.tokens = row.tokens[:known]
    read(guard, [row])
    row.catch_up()
    guard.close(row.request, row.tokens)
