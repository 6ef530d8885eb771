"""What all requests of one engine share: policy, detector, token table, delimiters, encoded triggers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from classifiers.detector import Detector
from guard.errors import UserError
from guard.policy import Policy
from guard.steps import Delimiters, TokenTable, find_delimiters
from guard.triggers import EncodedTrigger, encode_trigger, select

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GuardRuntime:
    """Read-only; one per engine process."""

    policy: Policy
    detector: Detector
    threshold: float
    table: TokenTable
    delimiters: Delimiters
    triggers: tuple[EncodedTrigger, ...]
    model: str
    tokenizer_hash: str

    @classmethod
    def build(cls, policy: Policy, detector: Detector, tokenizer: Tokenizer, model: str) -> GuardRuntime:
        """Prepares everything that depends on the tokenizer; a model that marks no reasoning is a UserError."""
        delimiters = find_delimiters(tokenizer)
        if delimiters.end is None and "answer" not in policy.zones:
            raise UserError(
                f"Model {model} marks no reasoning",
                wanted="<think> and </think> (or another known pair) as single tokens of its tokenizer",
                fix="Set `zones: [reasoning, answer]` in the policy to watch its answers",
            )
        return cls(
            policy=policy,
            detector=detector,
            threshold=detector.threshold if policy.threshold is None else policy.threshold,
            table=TokenTable.from_tokenizer(tokenizer),
            delimiters=delimiters,
            triggers=tuple(encode_trigger(t, tokenizer) for t in select(policy.triggers)),
            model=model,
            tokenizer_hash=tokenizer_hash(tokenizer),
        )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """12 hex digits over the tokenizer's whole specification: traces of another tokenizer cannot be mixed up."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12]
