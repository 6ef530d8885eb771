"""What the sidecar's routes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.errors import ApiError
from guard.sidecar.firewall import MAX_BODY, Firewall
from guard.sidecar.metrics import Metrics
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.probe import Probe
from guard.sidecar.receipts import WAIT_SECONDS, SpoolFollower
from guard.sidecar.upstream import Upstream
from guard.traces import Spool


@dataclass
class Sidecar:
    """One engine's front. `alive` says whether the engine's process runs."""

    runtime: GuardRuntime
    upstream: Upstream
    follower: SpoolFollower
    firewall: Firewall
    probe: Probe
    alive: Callable[[], bool]
    spool: Spool
    """Where the sidecar writes the traces of what it watched itself."""
    secret: str
    """Shared with the engine's guard alone."""
    served_name: str = "default"
    keep_special: bool = False
    """Ask the engine for special tokens in its text: where `</think>` is one, its reasoning parser needs to see it."""
    metrics: Metrics = field(default_factory=Metrics)
    max_body: int = MAX_BODY
    receipt_wait: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        self.metrics.in_flight.set_function(lambda: self.follower.held)
        self.metrics.malformed.set_function(lambda: self.follower.malformed)
        self.metrics.ready.set_function(lambda: float(self.probe.proven and self.alive()))

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.runtime.policy

    @property
    def closed(self) -> bool:
        """Whether a response that is not proven guarded must be withheld."""
        return self.policy.fail_mode == "closed"

    def check_open(self) -> None:
        """ApiError 503 while no request may go on: a dead engine, or a guard that was never seen to work."""
        if not self.alive():
            raise ApiError(503, "engine_unavailable", "The engine has stopped.")
        if self.closed and not self.probe.proven:
            raise ApiError(503, "not_ready", f"The guard has not been proven to work: {self.probe.reason}.")


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
) -> Sidecar:
    """Puts the parts together."""
    return Sidecar(
        runtime=runtime,
        upstream=upstream,
        follower=follower,
        firewall=Firewall(tokenizer_check, allow_seed=allow_seed),
        probe=Probe(upstream, follower, runtime, secret),
        alive=alive,
        spool=spool,
        secret=secret,
        served_name=served_name,
        keep_special=keep_special,
    )
