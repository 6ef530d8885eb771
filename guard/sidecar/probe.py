"""The proof of life: a real request whose first step counts as a cue, so that a real trigger must be forced.

Nothing else shows that the guard is loaded, sees tokens, scores, forces and writes traces: vLLM drops or starves a
logits processor without a word under several settings (STACK: speculative decoding, async scheduling).
"""

from __future__ import annotations

import asyncio
import time
import uuid

from guard.engine.session import PROBE_POLICY
from guard.runtime import GuardRuntime
from guard.sidecar.errors import ApiError
from guard.sidecar.proof import Delivered
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import Upstream
from guard.traces import Trace

MAX_AGE = 60.0
"""A proof older than this many seconds is renewed when `/ready` is asked."""
_MIN_GAP = 2.0
_TIMEOUT = 60.0
_MAX_TOKENS = 64
_STARTING = "the engine is starting"


class Probe:
    """Sends the probe and remembers what came of it."""

    def __init__(self, upstream: Upstream, follower: SpoolFollower, tenant: Tenant, secret: str) -> None:
        self._upstream, self._follower, self._secret = upstream, follower, secret
        self.tenant = tenant
        """Under whose policy and detector the proof stands."""
        self._lock = asyncio.Lock()
        self._tried = float("-inf")
        self._proved = float("-inf")
        self.reason: str | None = _STARTING
        """Why the guard is not ready; None when it is."""
        self.weights: str | None = None
        """Hash of the weights that must have answered; None: any."""
        self.proven = False
        """A forced injection was seen, and nothing has shown the opposite since. A busy engine does not unprove it."""

    async def ready(self) -> str | None:
        """None when a forced injection was seen within the last minute, else the reason; probes when it is due."""
        async with self._lock:
            now = time.monotonic()
            fresh = self.reason is None and now - self._proved < MAX_AGE
            if not fresh and now - self._tried >= _MIN_GAP:
                await self._run()
            return self.reason

    async def renew(self) -> str | None:
        """Probes now, whatever was proven before: the weights have changed."""
        async with self._lock:
            self.proven = False
            await self._run()
            return self.reason

    async def try_out(self, tenant: Tenant) -> str | None:
        """Whether the engine forces a trigger under a tenant's rules: None, or why not. Proves nothing else;
        ApiError when the engine cannot be reached."""
        return await self._probe(tenant)

    async def lose(self, reason: str) -> None:
        """What was proven counts no more: the engine has gone."""
        async with self._lock:
            self.proven, self.reason = False, reason
            self._proved = self._tried = float("-inf")

    async def _run(self) -> None:
        try:
            self.reason = await self._probe(self.tenant)
        except ApiError as error:
            self.reason = error.message if self.proven else f"{_STARTING}: {error.message}"
            return
        finally:
            self._tried = time.monotonic()
        self.proven = self.reason is None
        if self.proven:
            self._proved = self._tried

    async def _probe(self, tenant: Tenant) -> str | None:
        guard_id = f"probe-{uuid.uuid4().hex}"
        self._follower.expect(guard_id)
        try:
            response = await self._upstream.ask(self._body(guard_id, tenant), timeout=_TIMEOUT)
            if response.status_code != 200:
                return f"the engine answered the probe with HTTP {response.status_code}"
            delivered = Delivered(response.json()["usage"]["completion_tokens"])
            trace = await self._follower.wait(guard_id, delivered.covered_by)
        finally:
            self._follower.forget(guard_id)
        if trace is not None and self.weights is not None and trace.weights != self.weights:
            return f"the engine runs weights {trace.weights or 'without a hash'}, not {self.weights}"
        return probe_problem(trace, delivered, tenant.runtime) or _other_rules(trace, tenant.runtime)

    def _body(self, guard_id: str, tenant: Tenant) -> dict[str, object]:
        return {
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
            "vllm_xargs": {"guard_id": guard_id, "guard_probe": self._secret, **tenant.named(self._secret)},
        }


def probe_problem(trace: Trace | None, delivered: Delivered, runtime: GuardRuntime) -> str | None:
    """What is wrong with a probe's trace; None when a whole trigger was really forced into the output."""
    if trace is None:
        return "the probe left no trace: the guard is not loaded in the engine"
    if not delivered.covered_by(trace):
        return f"the probe's trace holds {len(trace.output_ids)} tokens, its response {delivered.tokens}"
    receipt = trace.receipt
    if receipt.errors:
        return f"the guard failed on the probe: {receipt.errors[0]}"
    if not receipt.clean:
        return "the probe was not scored or enforced in full"
    if len(receipt.interventions) != 1:
        return f"the probe saw {len(receipt.interventions)} interventions instead of one"
    done = receipt.interventions[0]
    if not done.completed:
        return "the probe's trigger was not forced to its end"
    wanted = {t.id: (t.plain, t.spaced, t.opening) for t in runtime.triggers}.get(done.trigger_id, ())
    if tuple(trace.output_ids[done.at : done.at + done.forced]) not in wanted:
        return "the probe's trigger is not in its output"
    return None


def _other_rules(trace: Trace | None, runtime: GuardRuntime) -> str | None:
    """The engine did not take the rules that it was told of."""
    if trace is None:
        return None
    receipt, policy = trace.receipt, runtime.policy.model_copy(update=PROBE_POLICY)
    if receipt.policy_hash != policy.hash:
        return f"the engine probed under policy {receipt.policy_hash}, not {policy.hash}"
    if receipt.detector != runtime.detector.version:
        return f"the engine's detector is {receipt.detector}, not {runtime.detector.version}"
    return None
