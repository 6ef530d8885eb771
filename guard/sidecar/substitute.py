"""Mode `substitute`: a step is held back until it is decided, and a trigger takes the place of a cue.

The engine streams token ids; `StepMonitor` reads them here as it does inside the engine. On a cue the stream is closed,
which ends the engine's request, and a new one continues from prompt, kept output and trigger, whose prefix the engine
has cached. Neither the client nor the model's context keeps the cue; the trace does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from guard.monitor import StepMonitor
from guard.sidecar.errors import ApiError


@dataclass(frozen=True)
class Piece:
    """What the engine streamed in one event: ids, and why it ended if it did (`stop`, `length`)."""

    ids: list[int]
    finish: str | None = None


Continue = Callable[[list[int], int], AsyncGenerator[Piece]]
"""Continues token ids by at most so many tokens."""
Score = Callable[[StepMonitor], Awaitable[float | None]]
"""The probability that the pending step is a cue; None where it cannot be scored."""


class Substitution:
    """One output under way. `prompt`: its ids; `limit`: the most output tokens; `eos`: the id that ends a reply."""

    def __init__(
        self, monitor: StepMonitor, prompt: list[int], limit: int, eos: int | None, go_on: Continue, score: Score
    ) -> None:
        self.monitor = monitor
        self.output: list[int] = []
        """Ids that were kept: what the client sees or will see."""
        self.finish: str | None = None
        """Why the output ended; None while it has not."""
        self._prompt, self._limit, self._eos = prompt, limit, eos
        self._go_on, self._score = go_on, score
        self._shown = 0

    @property
    def delivered(self) -> list[int]:
        """Ids that were let out: all of `output`, unless it broke off inside a step."""
        return self.output[: self._shown]

    async def released(self) -> AsyncIterator[list[int]]:
        """Ids in order, as soon as they are decided; ApiError 503 when the engine breaks off."""
        while self.finish is None:
            taken_back = False
            stream = self._go_on([*self._prompt, *self.output], self._limit - len(self.output))
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    taken_back = await self._take(piece)
                    if fresh := self._fresh():
                        yield fresh
                    if taken_back or self.finish is not None:
                        break
            if taken_back:
                self._say_trigger()
                if fresh := self._fresh():
                    yield fresh
            elif self.finish is None:
                raise ApiError(503, "engine_unavailable", "The engine broke off.")
        self.monitor.finish()

    async def _take(self, piece: Piece) -> bool:
        """Reads one piece; True when a cue was taken back, and what follows it counts no more."""
        # An engine that runs on past what it was asked for would fill the memory.
        room = self._limit - len(self.output)
        finish = piece.finish if len(piece.ids) <= room else "length"
        for token in piece.ids[:room]:
            self.output.append(token)
            self.monitor.observe(token)
            if await self._decide():
                return True
        if finish is not None:
            self.monitor.end_step()
            if await self._decide():
                return True
            self.finish = finish
        return False

    async def _decide(self) -> bool:
        if self.monitor.pending is None:
            return False
        back = self.monitor.decide(await self._score(self.monitor))
        if back is None:
            return False
        del self.output[back:]
        return True

    def _say_trigger(self) -> None:
        while (token := self.monitor.forced) is not None and len(self.output) < self._limit:
            self.output.append(token)
            self.monitor.observe(token)
        if self.output[-1] == self._eos:
            self.finish = "stop"
        elif len(self.output) >= self._limit:
            self.finish = "length"

    def _fresh(self) -> list[int]:
        start, self._shown = self._shown, self.monitor.settled
        return self.output[start : self._shown]
