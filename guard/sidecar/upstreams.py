"""Engines that run already (`serve --upstream`): which are proven, and which takes the next request.

None of them has our guard inside, so the sidecar's substitution is all there is. An engine takes requests only after a
probe has shown that a cue is really replaced in what it says; one that fails a health check, or breaks off under a
request, is out until it has shown that again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

from guard.runtime import GuardRuntime
from guard.sidecar.errors import ApiError
from guard.sidecar.probe import MAX_AGE
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import Upstream

INTERVAL = 2.0
"""Seconds between two health checks of an engine."""
Prove = Callable[[Upstream, GuardRuntime], Awaitable[str | None]]
"""What keeps an engine from being guarded under a policy; None: nothing. ApiError when it cannot be asked."""


@dataclass(eq=False)
class Remote:
    """One engine: its place in the order of `--upstream` (from 1), its client, the requests that it has."""

    number: int
    client: Upstream
    reason: str | None = "it was not asked yet"
    """Why it takes no requests; None: it does."""
    holding: WeakSet[object] = field(default_factory=WeakSet)
    proved: float = float("-inf")
    turn: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def stale(self) -> bool:
        """Whether it takes requests on a proof that is due to be renewed."""
        return self.reason is None and time.monotonic() - self.proved >= MAX_AGE


class Upstreams:
    """All engines of one sidecar; `run` must be running. Stands where one engine's `Probe` does."""

    def __init__(
        self, clients: Sequence[Upstream], tenant: Tenant, prove: Prove, *, interval: float = INTERVAL
    ) -> None:
        self.tenant = tenant
        """Under whose policy and detector the proofs stand."""
        self.remotes = tuple(Remote(number, client) for number, client in enumerate(clients, 1))
        self._prove_one, self._interval = prove, interval
        self._turns = 0

    @property
    def proven(self) -> bool:
        """Whether any engine takes requests."""
        return any(remote.reason is None for remote in self.remotes)

    @property
    def reason(self) -> str | None:
        """Why none does; None when one does."""
        if self.proven:
            return None
        return "no upstream takes requests: " + "; ".join(f"{r.number}: {r.reason}" for r in self.remotes)

    @property
    def states(self) -> dict[str, str]:
        """For each engine `ok`, or why it takes no requests."""
        return {str(remote.number): remote.reason or "ok" for remote in self.remotes}

    def take(self, request: object) -> Remote:
        """The engine with the fewest requests, the longest unasked first; ApiError 503 when none takes any.

        The request counts until `leave`, or until nothing refers to it any more.
        """
        fit = [remote for remote in self.remotes if remote.reason is None]
        if not fit:
            raise ApiError(503, "engine_unavailable", f"No request is taken: {self.reason}.")
        chosen = min(fit, key=lambda remote: (len(remote.holding), remote.turn))
        self._turns += 1
        chosen.turn = self._turns
        chosen.holding.add(request)
        return chosen

    async def ready(self) -> str | None:
        """None when at least one engine is proven, by a probe within the last minute; else the reason."""
        await asyncio.gather(*(self._renew(remote) for remote in self.remotes))
        return self.reason

    async def try_out(self, tenant: Tenant) -> str | None:
        """Whether every engine that takes requests is guarded under a tenant's rules: None, or why not. Proves nothing
        else; ApiError when one cannot be reached."""
        fit = [remote for remote in self.remotes if remote.reason is None]
        problems = await asyncio.gather(*(self._prove_one(remote.client, tenant.runtime) for remote in fit))
        found = (f"upstream {r.number}: {p}" for r, p in zip(fit, problems, strict=True) if p is not None)
        return next(found, self.reason)

    async def run(self) -> None:
        """Asks after every engine until cancelled."""
        await asyncio.gather(*(self._attend(remote) for remote in self.remotes))

    async def _attend(self, remote: Remote) -> None:
        while True:
            if not await remote.client.healthy():
                remote.reason = "it does not answer /health"
            elif remote.reason is not None:
                async with remote.lock:
                    await self._prove(remote)
            await asyncio.sleep(self._interval)

    async def _renew(self, remote: Remote) -> None:
        if remote.stale:
            async with remote.lock:
                # All who asked meanwhile share the probe of the first.
                if remote.stale:
                    await self._prove(remote)

    async def _prove(self, remote: Remote) -> None:
        """Probes an engine whose lock is held."""
        try:
            remote.reason = await self._prove_one(remote.client, self.tenant.runtime)
        except ApiError as error:
            remote.reason = error.message
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing was proven, and the checks must go on
            remote.reason = f"the probe failed: {type(error).__name__}: {error}"
        if remote.reason is None:
            remote.proved = time.monotonic()
