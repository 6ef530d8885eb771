"""What `/metrics` counts, in a registry of its own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from guard.policy import Policy
from guard.sidecar.observe import note, note_receipt
from guard.sidecar.proof import Proof
from guard.traces import GuardTime, StepRecord, Trace

if TYPE_CHECKING:
    from guard.sidecar.upstreams import Remote

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WHOSE = ("policy", "mode")


class Requests:
    """`reasonguard_requests_total`. A request of which no receipt is known counts for the policy in force."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = [*_WHOSE, "result"]
        self._counter = Counter("reasonguard_requests", "Requests by how they ended.", names, registry=registry)
        self.in_force: Callable[[], Policy] = Policy

    def labels(self, result: str, *whose: str) -> Counter:
        """Results: guarded, shadow, unwatched, unproven, refused, unauthorized, limited, engine_error, unavailable,
        disconnected.

        `whose`: the name and mode of the policy that it ran under."""
        policy = self.in_force()
        name, mode = whose or (policy.name, policy.mode)
        note(result=result, policy=name, mode=mode)
        return self._counter.labels(name, mode, result)


class Metrics:
    """One sidecar's counters. Labels come from fixed sets (results, zones, modes) and from the operator's policies,
    never from a client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        on = self.registry
        self.requests = Requests(on)
        self.steps = Counter("reasonguard_steps", "Steps the guard saw.", [*_WHOSE, "zone", "result"], registry=on)
        """Results: clear, cue, unscored, unreadable."""
        self.interventions = Counter(
            "reasonguard_interventions", "Cues answered by a trigger.", [*_WHOSE, "zone", "result"], registry=on
        )
        """Results: completed, or cut when the output ended inside the trigger. Zones: of the cue."""
        self.unanswered = Counter("reasonguard_unanswered_cues", "Cues that no trigger answered.", _WHOSE, registry=on)
        self.injected = Counter("reasonguard_injected_tokens", "Forced tokens, appended.", _WHOSE, registry=on)
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
        self.guard_request = Histogram(
            "reasonguard_guard_request_seconds",
            "What one request waited for the guard.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            registry=on,
        )
        self.guard_step = Histogram(
            "reasonguard_guard_step_seconds",
            "What one step waited to be judged.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
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
            "reasonguard_version_loads", "Changes of version by how they ended.", ["result"], registry=on
        )
        """Results: loaded, refused (its files), failed (the engine, or its proof)."""
        self.upstream_up = Gauge(
            "reasonguard_upstream_up", "1 while this upstream takes requests.", ["upstream"], registry=on
        )
        self.upstream_in_flight = Gauge(
            "reasonguard_upstream_requests_in_flight", "Requests that this upstream has.", ["upstream"], registry=on
        )
        self.keys = Gauge("reasonguard_keys", "Keys in force.", registry=on)
        self.reload_ok = Gauge("reasonguard_reload_ok", "0 while the last reload was refused.", registry=on)
        self.reload_ok.set(1)
        self.reloads = Counter("reasonguard_reloads", "Reloads by how they ended.", ["result"], registry=on)
        """Results: loaded, refused (what was in force stays)."""
        self.canary_requests = Counter(
            "reasonguard_canary_requests", "Requests by where a canary saw the first cue.",
            ["canary", *_WHOSE, "result"], registry=on,
        )  # fmt: skip
        """Results: neither, same, earlier, later, only_in_force, only_canary (`guard.sidecar.canary`)."""
        self.canary_steps = Counter("reasonguard_canary_steps", "Steps a canary scored.", ["canary"], registry=on)
        self.canary_left_out = Counter(
            "reasonguard_canary_left_out", "Chosen requests not compared.", ["canary", "result"], registry=on
        )
        """Results: dropped (too many waited), skipped (cannot be decided again), error."""
        self.engine_restarts = Counter("reasonguard_engine_restarts", "Dead engines started again.", registry=on)
        self.turned_away = Counter(
            "reasonguard_turned_away", "Requests that a limit refused or cut.", ["limit"], registry=on
        )
        """Limits: streams, time, drain."""
        self.ready = Gauge("reasonguard_ready", "1 after a forced injection was seen.", registry=on)

    def watch_upstream(self, remote: Remote) -> None:
        """Shows one engine's state from now on."""
        self.upstream_up.labels(str(remote.number)).set_function(lambda: float(remote.reason is None))
        self.upstream_in_flight.labels(str(remote.number)).set_function(lambda: float(len(remote.holding)))

    def count(self, proof: Proof) -> None:
        """Counts one finished response."""
        attached, whose = proof.attached, (proof.attached.policy, proof.attached.mode)
        note_receipt(attached)
        idle = "shadow" if attached.shadow else "unwatched"
        self.requests.labels("unproven" if proof.broken else "guarded" if attached.guarded else idle, *whose).inc()
        # A trace that contradicts itself must not turn its response into an error.
        self.unanswered.labels(*whose).inc(max(0, attached.unanswered))
        self.injected.labels(*whose).inc(attached.injected_tokens)
        if proof.trace is not None:
            self._time(proof.trace.guard_time)
            for labels, times in _steps(proof.trace).items():
                self.steps.labels(*whose, *labels).inc(times)
            for labels, times in _interventions(proof.trace).items():
                self.interventions.labels(*whose, *labels).inc(times)

    def _time(self, spent: GuardTime | None) -> None:
        if spent is not None:
            self.guard_request.observe(spent.total / 1e6)
            for each in spent.steps:
                self.guard_step.observe(each / 1e6)

    def page(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


def _steps(trace: Trace) -> Tally[tuple[str, str]]:
    """By zone and result. A cue that a trigger replaced is no step of the trace any more, and was one all the same."""
    seen: Tally[tuple[str, str]] = Tally((step.zone, _result(step)) for step in trace.steps if not step.injected)
    seen.update((_zone(trace, each.step), "cue") for each in trace.receipt.interventions if each.mode == "substitute")
    return seen


def _interventions(trace: Trace) -> Tally[tuple[str, str]]:
    done = trace.receipt.interventions
    return Tally((_zone(trace, each.step), "completed" if each.completed else "cut") for each in done)


def _zone(trace: Trace, step: int) -> str:
    """Where a cue was; one at the very end of an output may have left no step."""
    return trace.steps[min(step, len(trace.steps) - 1)].zone if trace.steps else "reasoning"


def _result(step: StepRecord) -> str:
    if step.score is None:
        return "unscored"
    if step.unreadable:
        return "unreadable"
    return "cue" if step.cue else "clear"
