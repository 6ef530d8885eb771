"""Which of several servers takes the next request: the one with the fewest in flight that is not resting."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

_LONGEST_REST = 30.0


@dataclass
class Site:
    """One server: its address, requests in flight, failures in a row, and until when (monotonic seconds) it rests."""

    url: str
    backoff: float
    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def failed(self, why: str, retry_after: str | None = None) -> str:
        """Notes that the request failed for this reason, and lets the server rest; returns the reason.

        Requests that were under way together fail together: they count as one failure.
        """
        now = time.monotonic()
        if now >= self.rests_until:
            self.failures += 1
            rest = self.backoff * 2 ** min(self.failures - 1, 16)
            if retry_after is not None and retry_after.isdecimal():
                rest = max(rest, float(retry_after))
            self.rests_until = now + min(rest, _LONGEST_REST)
        return why

    def recovered(self) -> None:
        """A request has succeeded."""
        self.failures = 0


class Sites:
    """Hands out servers, at most `concurrency` requests in flight on each."""

    def __init__(self, urls: Sequence[str], concurrency: int, backoff: float) -> None:
        self._sites = [Site(url, backoff) for url in urls]
        self._concurrency = concurrency
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Site]:
        """A server for one request; waits until one has room and none of its failures has to be sat out."""
        async with self._changed:
            while (site := self._free()) is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._until_one_wakes())
            site.in_flight += 1
        try:
            yield site
        finally:
            site.in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    def _free(self) -> Site | None:
        now = time.monotonic()
        ready = [s for s in self._sites if s.rests_until <= now and s.in_flight < self._concurrency]
        return min(ready, key=lambda site: site.in_flight, default=None)

    def _until_one_wakes(self) -> float | None:
        """Seconds until the first resting server is back; None when none rests (a release will wake us)."""
        now = time.monotonic()
        left = [s.rests_until - now for s in self._sites if s.rests_until > now]
        return min(left) if left else None
