"""From a trace to what is attached to a response: was it guarded, and what did the guard do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel, ConfigDict

from guard.policy import Policy
from guard.sidecar.errors import ApiError
from guard.steps import Zone
from guard.traces import Mode, Receipt, Trace

RECEIPT_HEADER = "x-reasonguard-receipt"
ID_HEADER = "x-reasonguard-id"


class Attached(BaseModel):
    """The receipt as clients get it: in a header, in the body, in a stream's last event."""

    model_config = ConfigDict(frozen=True)

    guard_id: str
    guarded: bool
    """Steps were seen in `zones`, all were scored, every forced token was appended, under the policy in force, not in
    shadow."""
    reason: str | None = None
    """Why `guarded` is false."""
    zones: tuple[Zone, ...] = ()
    """What was watched; whatever else the response holds passed unseen, `guarded` or not. Empty where nothing shows
    that anything was."""
    unwatched_tokens: int | None = None
    """Generated tokens outside of them, the marks between zones included; None where no trace tells."""
    seen: int = 0
    scored: int = 0
    unscored: int = 0
    unreadable: int = 0
    """Enciphered or encoded steps, which no classifier can clear."""
    interventions: int = 0
    unanswered: int = 0
    """Cues that no trigger answered: the budget was used up, the output ended, or shadow mode."""
    injected_tokens: int = 0
    replaced_tokens: int = 0
    """Tokens of cues that a trigger replaced: neither delivered nor kept in the model's context."""
    mode: Mode
    fallback: str | None = None
    """Why a policy of mode `substitute` injected."""
    policy: str
    policy_hash: str
    detector: str | None = None
    engine: str | None = None
    shadow: bool = False
    upstream: int | None = None
    """Which `--upstream` answered, in their order; None where `serve` started the engine."""
    version: int | None = None
    """Promoted version whose weights the request ended on (0: the model as it came); None where none is followed."""
    began_version: int | None = None
    """The version it began on, where the weights were exchanged under it."""

    def compact(self) -> str:
        """One line of ASCII JSON, fit for a header."""
        return self.model_dump_json(exclude_none=True, ensure_ascii=True)


@dataclass(frozen=True)
class Delivered:
    """What the client was given, as the engine counted it."""

    tokens: int | None
    """`usage.completion_tokens`; None when the engine gave none."""
    cut_at_text: bool = False
    """Ended by a stop string: the engine may have run on for a few tokens that were never delivered."""

    def covered_by(self, trace: Trace) -> bool:
        """Whether the trace holds every delivered token."""
        if self.tokens is None:
            return True
        written = trace.output_tokens
        return written >= self.tokens if self.cut_at_text else written == self.tokens


@dataclass(frozen=True)
class Proof:
    """The attached receipt, and whether the fail mode must act on it."""

    attached: Attached
    broken: bool
    """Not proven to be guarded. What the policy itself leaves unguarded (shadow mode, another zone) is no break."""
    trace: Trace | None = None
    """What it was judged by."""


@dataclass(frozen=True)
class Followed:
    """What `serve --versions` knows of a request: versions by weights hash, and the one it began on."""

    known: Mapping[str, int]
    began: int

    def problem(self, trace: Trace) -> str | None:
        """Weights that no version accounts for."""
        if trace.weights in self.known:
            return None
        return f"weights {trace.weights or 'without a hash'} answered, which are no version"

    def fields(self, trace: Trace) -> dict[str, int]:
        """The receipt's `version` and, where they differ, `began_version`."""
        version = self.known.get(trace.weights)
        found = {} if version is None else {"version": version}
        return found if version == self.began else found | {"began_version": self.began}


def prove(
    guard_id: str,
    trace: Trace | None,
    delivered: Delivered,
    policy: Policy,
    *,
    mode: Mode = "inject",
    fallback: str | None = None,
    followed: Followed | None = None,
    upstream: int | None = None,
) -> Proof:
    """Judges one response by its trace; `mode` is how it was guarded, `upstream` which of several engines answered."""
    if trace is None:
        nothing = Attached(
            guard_id=guard_id, guarded=False, reason="no trace of this response was written", mode=mode,
            fallback=fallback, policy=policy.name, policy_hash=policy.hash, upstream=upstream,
        )  # fmt: skip
        return Proof(nothing, broken=True)
    receipt = trace.receipt
    problem = _problem(trace, delivered, policy) or (followed.problem(trace) if followed is not None else None)
    reason = problem or _left_alone(receipt)
    zones = policy.zones if receipt.policy_hash == policy.hash else ()
    attached = Attached(
        guard_id=guard_id,
        guarded=reason is None,
        reason=reason,
        zones=zones,
        unwatched_tokens=_unwatched(trace, zones),
        seen=receipt.seen,
        scored=receipt.scored,
        unscored=receipt.unscored,
        unreadable=receipt.unreadable,
        interventions=len(receipt.interventions),
        unanswered=trace.cues - len(receipt.interventions),
        injected_tokens=receipt.injected_tokens,
        replaced_tokens=trace.replaced_tokens,
        mode=mode,
        fallback=fallback,
        policy=receipt.policy,
        policy_hash=receipt.policy_hash,
        detector=receipt.detector,
        engine=receipt.engine,
        shadow=receipt.shadow,
        upstream=upstream,
        **(followed.fields(trace) if followed is not None else {}),
    )
    return Proof(attached, broken=problem is not None, trace=trace)


def _unwatched(trace: Trace, zones: tuple[Zone, ...]) -> int:
    # Where everything was watched to the end, only marks and white space stand in no step.
    everything = set(zones) == set(get_args(Zone)) and trace.receipt.clean
    return 0 if everything else trace.stepless_tokens


def _left_alone(receipt: Receipt) -> str | None:
    if receipt.shadow:
        return "shadow mode: the guard decided and logged, and forced nothing"
    if not receipt.seen:
        return "nothing was generated in the zones that the policy watches"
    return None


def _problem(trace: Trace, delivered: Delivered, policy: Policy) -> str | None:
    receipt = trace.receipt
    if not delivered.covered_by(trace):
        return f"its trace holds {trace.output_tokens} tokens, the response {delivered.tokens}"
    if receipt.policy_hash != policy.hash:
        return f"the engine applied policy {receipt.policy_hash}, not {policy.hash}"
    if receipt.errors:
        return f"the guard failed: {receipt.errors[0]}"
    if receipt.enforcement_failed:
        return f"{receipt.enforcement_failed} forced tokens were not appended"
    if receipt.unscored:
        return f"{receipt.unscored} of {receipt.seen} steps were not scored"
    return None


def unproven(proof: Proof) -> ApiError:
    """The refusal of a policy that fails closed."""
    return ApiError(502, "not_guarded", f"The response could not be proven guarded: {proof.attached.reason}.")
