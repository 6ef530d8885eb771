"""What all requests of one engine share: policy, detector, token table, zone grammar, encoded triggers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from classifiers.detector import Detector
from guard.errors import UserError
from guard.policy import Policy
from guard.steps import TokenTable
from guard.triggers import POOL, EncodedRefusal, EncodedTrigger, encode_refusal, encode_trigger, select
from guard.zones import State, ZoneGrammar, ZoneReader, find_grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GuardRuntime:
    """Read-only; one per engine process, and one view of it per policy."""

    policy: Policy
    detector: Detector
    threshold: float
    table: TokenTable
    loud: bytearray
    """Per token id, 1: may end a step or change the zone. All others are quiet: the guard need not look at each."""
    grammar: ZoneGrammar
    triggers: tuple[EncodedTrigger, ...]
    """Those that the policy lets in."""
    pool: tuple[EncodedTrigger, ...]
    """All of them."""
    refusal: EncodedRefusal
    """What closes a request."""
    eos: int | None
    """The id that ends a reply."""
    model: str
    tokenizer_hash: str

    @classmethod
    def build(
        cls, policy: Policy, detector: Detector, tokenizer: Tokenizer, model: str, eos: int | None = None
    ) -> GuardRuntime:
        """Prepares everything that depends on the tokenizer; a model that marks no reasoning is a UserError, and so is
        a policy that stops requests where nothing says how a reply ends (`eos`)."""
        grammar = find_grammar(tokenizer)
        _check(policy, grammar, model, eos)
        table = TokenTable.from_tokenizer(tokenizer)
        pool = tuple(encode_trigger(t, tokenizer) for t in POOL)
        return cls(
            policy=policy,
            detector=detector,
            threshold=_threshold(policy, detector),
            table=table,
            loud=_loud(table, grammar),
            grammar=grammar,
            triggers=_chosen(policy, pool),
            pool=pool,
            refusal=encode_refusal(tokenizer, eos),
            eos=eos,
            model=model,
            tokenizer_hash=tokenizer_hash(tokenizer),
        )

    def under(self, policy: Policy, detector: Detector | None = None) -> GuardRuntime:
        """The same tables under another policy, and another detector if one is given. UserError as in `build`."""
        _check(policy, self.grammar, self.model, self.eos)
        detector = detector or self.detector
        return replace(
            self, policy=policy, detector=detector, threshold=_threshold(policy, detector),
            triggers=_chosen(policy, self.pool),
        )  # fmt: skip

    def zones(self, state: State | None = None) -> ZoneReader:
        """A reader for one output that begins in a state."""
        return ZoneReader(self.grammar, self.table, state)


def _check(policy: Policy, grammar: ZoneGrammar, model: str, eos: int | None) -> None:
    if not grammar.marks and "answer" not in policy.zones:
        raise UserError(
            f"Model {model} marks no reasoning",
            wanted="<think> and </think> (or another known family's marks) as single tokens of its tokenizer",
            fix="Set `zones: [reasoning, answer]` in the policy to watch its answers",
        )
    if eos is None and "stop" in policy.ladder:
        raise UserError(f"Policy key `ladder`: `stop` needs an end-of-turn token, and {model} names none")


def _threshold(policy: Policy, detector: Detector) -> float:
    return detector.threshold if policy.threshold is None else policy.threshold


def _chosen(policy: Policy, pool: tuple[EncodedTrigger, ...]) -> tuple[EncodedTrigger, ...]:
    ids = {trigger.id for trigger in select(policy.triggers)}
    return tuple(trigger for trigger in pool if trigger.id in ids)


def _loud(table: TokenTable, grammar: ZoneGrammar) -> bytearray:
    loud = bytearray(table.can_end)
    for token in (*table.markers, *grammar.marks):
        loud[token] = 1
    return loud


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """12 hex digits over what gives ids their text: traces of another tokenizer cannot be mixed up.

    What only frames a prompt is left out: transformers adds it where the file has none.
    """
    spec = json.loads(tokenizer.to_str())
    for framing in ("post_processor", "truncation", "padding"):
        spec.pop(framing, None)
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
