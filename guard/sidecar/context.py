"""What the sidecar's routes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.canary import Comparer
from guard.sidecar.errors import ApiError
from guard.sidecar.firewall import MAX_BODY, Firewall
from guard.sidecar.keeper import Keeper
from guard.sidecar.limits import Limits
from guard.sidecar.metrics import Metrics
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.probe import Probe
from guard.sidecar.proof import Followed, Proof
from guard.sidecar.quotas import Meter
from guard.sidecar.receipts import WAIT_SECONDS, SpoolFollower
from guard.sidecar.rules import Rules
from guard.sidecar.tenants import Tenant, holder
from guard.sidecar.upstream import Upstream
from guard.sidecar.upstreams import Remote, Upstreams
from guard.sidecar.versions import Served, Versions
from guard.traces import Spool
from guard.weights import BASE, Registry

if TYPE_CHECKING:
    from guard.sidecar.admin import Reloader


@dataclass
class Sidecar:
    """One engine's front. `alive` says whether the engine's process runs."""

    runtime: GuardRuntime
    """Under the policy that applies where no key says otherwise."""
    upstream: Upstream
    follower: SpoolFollower
    firewall: Firewall
    probe: Probe | Upstreams
    alive: Callable[[], bool]
    spool: Spool
    """Where the sidecar writes the traces of what it watched itself."""
    secret: str
    """Shared with the engine's guard alone; tenants' cache salts are made from it."""
    base: Served
    """The weights that the engine was started with."""
    served_name: str = "default"
    upstreams: Upstreams | None = None
    """Engines that ran already and have no guard of ours; None: `upstream` is the one engine, and has."""
    models: frozenset[str] | None = None
    """The names that may be asked for; None: the engine knows its own."""
    detector: str | None = None
    """See `Tenant.detector`."""
    keys: Mapping[str, Tenant] | None = None
    """Tenants by their key's hash; None: nobody is asked for a key."""
    meter: Meter = field(default_factory=Meter)
    reloader: Reloader | None = None
    versions: Versions | None = None
    """Follows a registry of promoted versions; None: the weights stay what they are."""
    keep_special: bool = False
    """Ask the engine for special tokens in its text: where `</think>` is one, its reasoning parser needs to see it."""
    metrics: Metrics = field(default_factory=Metrics)
    limits: Limits = field(init=False)
    comparer: Comparer = field(init=False)
    """Shows finished responses to the canary, if there is one."""
    keeper: Keeper | None = None
    """Starts a dead engine again; None: it stays dead."""
    completions: bool = False
    """Whether `/v1/completions` is served."""
    max_body: int = MAX_BODY
    receipt_wait: float = WAIT_SECONDS
    holding: WeakSet[object] = field(default_factory=WeakSet)
    """Requests in mode `substitute` that are under way."""

    def __post_init__(self) -> None:
        self.follower.charge = self.meter.charge
        self.limits, self.comparer = Limits(self.metrics), Comparer(self.metrics)
        self.metrics.requests.in_force = lambda: self.policy
        self.metrics.in_flight.set_function(self.in_flight)
        self.metrics.malformed.set_function(lambda: self.follower.malformed)
        for each in self.upstreams.remotes if self.upstreams is not None else ():
            self.metrics.watch_upstream(each)
        self.metrics.ready.set_function(lambda: float(self.probe.proven and self.alive()))

    def take(self, request: object) -> Remote:
        """The engine that a request goes to; ApiError 503 when none of several takes any."""
        return Remote(0, self.upstream) if self.upstreams is None else self.upstreams.take(request)

    @property
    def aside(self) -> dict[str, object]:
        """What has the engine's own guard stand aside, where it has one."""
        return {"vllm_xargs": {"guard_aside": self.secret}} if self.upstreams is None else {}

    async def close(self) -> None:
        """Closes all connections to engines, and ends the comparisons."""
        self.comparer.close()
        clients = [self.upstream] if self.upstreams is None else [r.client for r in self.upstreams.remotes]
        for client in clients:
            await client.close()

    def done(self, proof: Proof, tenant: Tenant) -> None:
        """Counts one finished response, and shows it to the canary."""
        self.metrics.count(proof)
        self.comparer.offer(proof, tenant.runtime)

    def in_flight(self) -> int:
        """Requests that have no receipt yet."""
        return self.follower.held + len(self.holding)

    @property
    def rules(self) -> Rules:
        """What is in force."""
        return Rules(Tenant("", self.runtime, self.detector), self.keys, self.comparer.canary)

    def adopt(self, rules: Rules) -> None:
        """Puts other rules in force, for requests that begin from now on."""
        self.runtime, self.detector, self.keys = rules.default.runtime, rules.default.detector, rules.keys
        self.probe.tenant = rules.default
        self.comparer.use(rules.canary, rules.default.runtime.detector)
        self.metrics.keys.set(len(rules.keys or {}))

    def tenant(self, authorization: str) -> Tenant | None:
        """Whose request this is, by its `Authorization` header; None: it has no key that is known here."""
        rules = self.rules
        return rules.default if rules.keys is None else holder(rules.keys, authorization)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.runtime.policy

    @property
    def serving(self) -> Served:
        """The weights that the engine holds now."""
        return self.base if self.versions is None else self.versions.serving

    @property
    def followed(self) -> Followed | None:
        """What a request that begins now will be held against; None where no versions are followed."""
        return None if self.versions is None else Followed(self.versions.known, self.versions.serving.version)

    @property
    def exchanging(self) -> str | None:
        """Why the engine's weights are not the ones that requests are meant for; None: they are."""
        if self.versions is None or (self.versions.settled and self.versions.broken is None):
            return None
        return self.versions.broken or "the version in force is being loaded."

    async def enter(self, tenant: Tenant) -> None:
        """Waits while weights are exchanged, then lets a tenant's request in, or not: see `check_open`."""
        if self.versions is not None:
            await self.versions.gate.wait()
        self.check_open(tenant)

    def check_open(self, tenant: Tenant) -> None:
        """ApiError 503 while no request may go on: a dead engine, or a guard that was never seen to work."""
        if not self.alive():
            raise ApiError(503, "engine_unavailable", "The engine has stopped.")
        if tenant.closed and not self.probe.proven:
            reason = (self.probe.reason or "").rstrip(".")
            raise ApiError(503, "not_ready", f"The guard has not been proven to work: {reason}.")
        if self.exchanging is not None:
            raise ApiError(503, "not_ready", f"No request is taken: {self.exchanging}")


def build_sidecar(
    runtime: GuardRuntime,
    tokenizer_check: Neutraliser,
    upstream: Upstream,
    follower: SpoolFollower,
    *,
    secret: str,
    alive: Callable[[], bool],
    spool: Spool,
    served_name: str,
    allow_seed: bool,
    keep_special: bool = False,
    registry: Registry | None = None,
    weights: str = "",
    upstreams: Upstreams | None = None,
) -> Sidecar:
    """Puts the parts together. `weights`: the hash of the model's own; with a `registry` its versions are followed.

    `upstreams`: engines that run already; `upstream` is then one of them, asked for the list of models.
    """
    probe = Probe(upstream, follower, Tenant("", runtime), secret)
    sidecar = Sidecar(
        runtime=runtime,
        upstream=upstream,
        follower=follower,
        firewall=Firewall(tokenizer_check, allow_seed=allow_seed),
        probe=upstreams or probe,
        upstreams=upstreams,
        alive=alive,
        spool=spool,
        secret=secret,
        served_name=served_name,
        keep_special=keep_special,
        models=None if upstreams is None else frozenset({served_name}),
        base=Served(BASE, runtime.model, weights),
    )
    if registry is not None:
        sidecar.versions = Versions(
            registry, sidecar.base, upstream, probe, sidecar.in_flight, sidecar.metrics
        )  # fmt: skip
    return sidecar
