"""Keeps the engine on the version that a registry names, without a restart and without an unproven answer.

A change of `current` is seen within a second. The version's files are checked against their hashes while traffic goes
on; then new requests wait, those in flight get `DRAIN` seconds to end, the engine exchanges its weights, and a real
injection must be seen in a trace that names the new weights before anyone is let in. Whatever fails on the way, the
weights that were good before come back and are proven again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guard.errors import UserError
from guard.sidecar.errors import ApiError
from guard.sidecar.metrics import Metrics
from guard.sidecar.probe import Probe
from guard.sidecar.upstream import Upstream
from guard.weights import BASE, Registry, unlike

DRAIN = 10.0
"""Seconds that requests in flight get to end on the old weights; the rest is carried over, and its receipt says so."""
_POLL = 1.0
_TICK = 0.05


@dataclass(frozen=True)
class Served:
    """One version as the engine loads it: a path or hub name, and its `weights_hash`."""

    version: int
    model: str
    weights: str


class Versions:
    """Follows one registry for one engine; `run` must be running. `held` counts requests in flight."""

    def __init__(
        self, registry: Registry, base: Served, upstream: Upstream, probe: Probe, held: Callable[[], int],
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._registry, self._base, self._upstream, self._probe = registry, base, upstream, probe
        self._held, self._metrics = held, metrics
        self._tried: tuple[int, int] | None = None
        self._switching = asyncio.Lock()
        self.serving = base
        self.known = {base.weights: base.version}
        """Version by weights hash, of everything that was loaded so far."""
        self.gate = asyncio.Event()
        """Set while new requests may go to the engine."""
        self.gate.set()
        self.settled = False
        """Whether the version in force at the start was loaded, or was found to be unfit."""
        self.problem: str | None = None
        """Why the version that `current` names is not served."""
        self.broken: str | None = None
        """Why the engine can answer nobody: it holds neither the old nor the new weights."""
        probe.weights = base.weights

    async def run(self) -> None:
        """Follows until cancelled."""
        while True:
            if self._probe.proven and self.broken is None:
                try:
                    await self.follow()
                except Exception as error:  # noqa: BLE001 - it must go on, and say what went wrong
                    self.problem, self.settled = f"following failed: {type(error).__name__}: {error}", True
            await asyncio.sleep(_POLL)

    async def start_over(self) -> None:
        """The engine has gone, and another starts on the model as it came."""
        async with self._switching:
            self.serving, self._probe.weights = self._base, self._base.weights
            self._tried = self.problem = self.broken = None
            self.settled = False
        self._metrics.version.set(self.serving.version)

    async def follow(self) -> None:
        """Loads the version that `current` names if it is another; one that failed is tried again once named anew."""
        try:
            wanted = self._registry.current()
        except UserError as error:
            self.problem, self.settled = str(error), True
            return
        named = (wanted, self._stamp())
        if named != self._tried:
            self._tried = named
            self._metrics.version_wanted.set(wanted)
            if wanted == self.serving.version:
                self.problem = None
            else:
                async with self._switching:
                    await self._switch(wanted)
        self.settled = True

    async def _switch(self, wanted: int) -> None:
        outcome = "refused"
        try:
            target = await asyncio.to_thread(self._checked, wanted)
            self.gate.clear()
            await self._drain()
            outcome = "failed"
            self.problem = await self._load(target)
        except (UserError, OSError) as error:
            self.problem = f"version {wanted} is not served: {error}"
        except ApiError as error:
            self.problem = self.broken = error.message
        finally:
            self.gate.set()
        self._metrics.version_loads.labels("loaded" if self.problem is None else outcome).inc()
        self._metrics.version.set(self.serving.version)

    def _checked(self, version: int) -> Served:
        if version == BASE:
            return self._base
        manifest = self._registry.verify(version, self._base.weights)
        model = self._registry.model(version)
        if different := unlike(model, Path(self._base.model)):
            raise UserError("its tensors are not those of the model that is served", got=", ".join(different[:5]))
        return Served(version, str(model), manifest.weights)

    async def _load(self, target: Served) -> str | None:
        """None when the engine is proven to run on `target`, else why it is back on what it ran on before."""
        before = self.serving
        # Requests that are carried over may end before the exchange is reported.
        self.known[target.weights] = target.version
        problem = await self._upstream.exchange_weights(target.model, before.model)
        if problem is None:
            problem = await self._proven(target)
            if problem is None:
                return None
            worse = await self._upstream.exchange_weights(before.model, target.model)
            if worse is not None:
                raise ApiError(503, "engine_unavailable", f"Version {before.version} did not come back: {worse}.")
        await self._proven(before)
        return f"version {target.version} is not served: {problem}"

    async def _proven(self, served: Served) -> str | None:
        self.serving = served
        self._probe.weights = served.weights
        return await self._probe.renew()

    async def _drain(self) -> None:
        """The first tick lets requests that have just passed the gate be counted."""
        deadline = time.monotonic() + DRAIN
        await asyncio.sleep(_TICK)
        while self._held() and time.monotonic() < deadline:
            await asyncio.sleep(_TICK)

    def _stamp(self) -> int:
        try:
            return (self._registry.root / "current").stat().st_mtime_ns
        except OSError:
            return 0
