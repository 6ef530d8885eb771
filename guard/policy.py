"""What an operator sets: zones, threshold, triggers, budgets, fail mode; versioned and hashed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.settings import read_mapping, validated
from guard.steps import StepLimits, Zone
from guard.traces import LogContent, Mode, Rung

MAX_HELD_TOKENS = 64


class Policy(BaseModel):
    """The guard's settings. YAML keys are the field names; every field has a safe default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "default"
    version: int = 1
    zones: tuple[Zone, ...] = Field(default=("reasoning",), min_length=1)
    """Zones whose steps are scored; none at all would look guarded and watch nothing."""
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    """Score from which a step is a cue; None takes the detector manifest's."""
    mode: Mode = "inject"
    """`inject`: the trigger follows the cue. `substitute`: the sidecar holds a step back, and the trigger takes the
    cue's place, so that neither the client nor the model's context keeps it; requests that cannot be held back are
    injected into."""
    shadow: bool = False
    """Decide and log, never force."""
    ladder: tuple[Rung, ...] = Field(default=("trigger", "trigger", "strong", "refuse"), max_length=16)
    """How each cue of a request in turn is answered, and so how many are: by a `trigger`, by a `strong` one that
    refuses in so many words, by closing the reasoning and ending with a refusal (`refuse`), by ending at once (`stop`).
    No trigger is used twice in one request; once they run out, a `trigger` or `strong` is passed over for the next rung
    that can act. Empty: no cue is answered."""
    min_step_chars: int = Field(default=12, ge=1, le=200)
    max_step_tokens: int = Field(default=96, ge=8, le=512)
    triggers: tuple[str, ...] = ()
    """Ids of the pool's triggers that may be used; empty: all of them. Few of them make the ladder's `refuse` and
    `stop` come sooner."""
    unreadable: Literal["cue", "flag"] = "cue"
    """What an enciphered or encoded step means, which no classifier can clear: `cue` answers it with a trigger,
    `flag` only counts it on the receipt."""
    fail_mode: Literal["closed", "open"] = "closed"
    """What an error inside the guard means: `closed` treats the step as a cue and ends a broken request, `open` lets
    it pass and flags the receipt."""
    log_content: LogContent = "full"
    """What traces keep of a request, from the moment they are written: `ids` leaves the request's text out (token ids
    stay, from which a holder of the tokenizer can read it), `none` the ids as well: receipts and counts remain."""

    @property
    def canonical(self) -> str:
        """Every setting as JSON, in one spelling: what is hashed, and what a request names its policy by."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def hash(self) -> str:
        """12 hex digits that change with any setting."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:12]

    @property
    def strict(self) -> Policy:
        """The same, but it always forces and fails closed: for requests that nobody vouches for."""
        return self.model_copy(update={"shadow": False, "fail_mode": "closed"})

    def is_cue(self, score: float | None, *, threshold: float, unreadable: bool) -> bool:
        """Whether a step is answered as a cue: `score` is its probability, None where it could not be scored."""
        scored = self.fail_mode == "closed" if score is None else score >= threshold
        return scored or (unreadable and self.unreadable == "cue")

    @property
    def limits(self) -> StepLimits:
        """Step limits for the splitter. Under `substitute` a step of at most 64 tokens is held back."""
        most = self.max_step_tokens if self.mode == "inject" else min(self.max_step_tokens, MAX_HELD_TOKENS)
        return StepLimits(self.min_step_chars, most)


def load_policy(path: Path | None) -> Policy:
    """Reads a policy file; None is the default policy. A bad file is a UserError that names the key."""
    if path is None:
        return Policy()
    return validated(Policy, read_mapping(path, "Policy file"), f"Policy file {path}")
