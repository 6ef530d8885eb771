"""Starts an engine again that died while it served: after a pause that grows, and not for ever.

Nobody is let in before a new injection was seen: the proof and the version in service belong to the process that died.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from guard.errors import UserError
from guard.sidecar.metrics import Metrics
from guard.sidecar.probe import Probe
from guard.sidecar.versions import Versions

log = logging.getLogger(__name__)

RESTARTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
FORGIVEN = 600.0
"""Seconds that an engine must have lived for its predecessors' deaths to count no more."""


class Startable(Protocol):
    """An engine's process (`guard.engine.launch.Engine`)."""

    def start(self) -> None:
        """Starts it. UserError when its log cannot be written."""

    def stop(self) -> None:
        """Ends whatever is left of it."""


class Keeper:
    """Keeps one engine running. `most`: how many deaths in a row are answered with another start; 0: none."""

    def __init__(self, engine: Startable, probe: Probe, versions: Versions | None, metrics: Metrics, most: int) -> None:
        self._engine, self._probe, self._versions, self._metrics, self._most = engine, probe, versions, metrics, most
        self._deaths = 0
        self._started = time.monotonic()
        self.served = False
        """Whether an engine of it was ever proven."""
        self._given_up = most == 0

    @property
    def trying(self) -> bool:
        """Whether an engine that dies, or has just died, is started again."""
        return (self.served or self._probe.proven) and not self._given_up

    async def start_again(self) -> bool:
        """Call when the engine has died. True once another was started; False when none will be: it was never proven
        (what keeps it from starting will not change), or it has died too often."""
        self.served |= self._probe.proven
        if time.monotonic() - self._started > FORGIVEN:
            self._deaths = 0
        while self.trying and self._deaths < self._most:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._deaths)
            self._deaths += 1
            await self._probe.lose("the engine has stopped, and is started again")
            log.warning("the engine has stopped: start %d of %d in %.0f s", self._deaths, self._most, pause)
            # Its core and workers can outlive the server that was killed.
            await asyncio.to_thread(self._engine.stop)
            if self._versions is not None:
                await self._versions.start_over()
            await asyncio.sleep(pause)
            if await self._start():
                return True
        self._given_up = True
        return False

    async def _start(self) -> bool:
        try:
            await asyncio.to_thread(self._engine.start)
        except (UserError, OSError) as error:
            log.warning("the engine was not started: %s", error)
            return False
        self._started = time.monotonic()
        self._metrics.engine_restarts.inc()
        return True
