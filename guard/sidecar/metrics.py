"""What `/metrics` counts, in a registry of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from guard.sidecar.proof import Attached

if TYPE_CHECKING:
    from guard.sidecar.upstreams import Remote

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One sidecar's counters. Labels come from fixed sets, never from a client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = self.registry
        self.requests = Counter("reasonguard_requests", "Chat requests by how they ended.", ["outcome"], registry=on)
        """Outcomes: guarded, shadow, unwatched, unproven, refused, unauthorized, limited, engine_error, unavailable,
        disconnected."""
        self.steps = Counter("reasonguard_steps", "Steps that the guard saw.", ["kind"], registry=on)
        self.interventions = Counter("reasonguard_interventions", "Cues answered by a trigger.", registry=on)
        self.unanswered = Counter("reasonguard_unanswered_cues", "Cues that no trigger answered.", registry=on)
        self.injected = Counter("reasonguard_injected_tokens", "Forced tokens that were appended.", registry=on)
        self.receipt_wait = Histogram(
            "reasonguard_receipt_wait_seconds",
            "From the end of generation to the receipt.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            registry=on,
        )
        self.reentry = Histogram(
            "reasonguard_reentry_seconds",
            "From a substituted cue to the first token after its trigger.",
            buckets=(0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5),
            registry=on,
        )
        self.malformed = Gauge("reasonguard_spool_malformed_lines", "Spool lines that were no trace.", registry=on)
        self.in_flight = Gauge("reasonguard_requests_in_flight", "Requests without a receipt yet.", registry=on)
        self.store_up = Gauge("reasonguard_store_up", "1 while the store takes what the spool holds.", registry=on)
        self.store_behind = Gauge("reasonguard_store_behind_bytes", "Spool that is not in the store yet.", registry=on)
        self.store_traces = Counter("reasonguard_store_traces", "Traces written to the store.", registry=on)
        self.store_malformed = Counter("reasonguard_store_malformed_lines", "Lines the store left out.", registry=on)
        self.store_failures = Counter("reasonguard_store_failures", "Failed tries to feed the store.", registry=on)
        self.version = Gauge("reasonguard_version", "Version in service; 0 is the model as it came.", registry=on)
        self.version_wanted = Gauge("reasonguard_version_wanted", "Version that the registry names.", registry=on)
        self.version_loads = Counter(
            "reasonguard_version_loads", "Changes of version by how they ended.", ["outcome"], registry=on
        )
        """Outcomes: loaded, refused (its files), failed (the engine, or its proof)."""
        self.upstream_up = Gauge(
            "reasonguard_upstream_up", "1 while this upstream takes requests.", ["upstream"], registry=on
        )
        self.upstream_in_flight = Gauge(
            "reasonguard_upstream_requests_in_flight", "Requests that this upstream has.", ["upstream"], registry=on
        )
        self.keys = Gauge("reasonguard_keys", "Keys in force.", registry=on)
        self.reload_ok = Gauge("reasonguard_reload_ok", "0 while the last reload was refused.", registry=on)
        self.reload_ok.set(1)
        self.reloads = Counter("reasonguard_reloads", "Reloads by how they ended.", ["outcome"], registry=on)
        """Outcomes: loaded, refused (what was in force stays)."""
        self.ready = Gauge("reasonguard_ready", "1 after a forced injection was seen.", registry=on)

    def watch_upstream(self, remote: Remote) -> None:
        """Shows one engine's state from now on."""
        self.upstream_up.labels(str(remote.number)).set_function(lambda: float(remote.reason is None))
        self.upstream_in_flight.labels(str(remote.number)).set_function(lambda: float(len(remote.holding)))

    def count(self, attached: Attached, *, broken: bool) -> None:
        """Counts one finished response."""
        idle = "shadow" if attached.shadow else "unwatched"
        outcome = "unproven" if broken else "guarded" if attached.guarded else idle
        self.requests.labels(outcome).inc()
        self.steps.labels("scored").inc(attached.scored)
        self.steps.labels("unscored").inc(attached.unscored)
        self.steps.labels("unreadable").inc(attached.unreadable)
        self.interventions.inc(attached.interventions)
        self.unanswered.inc(attached.unanswered)
        self.injected.inc(attached.injected_tokens)

    def page(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
