"""The pool of safety triggers, and how one is chosen.

A trigger is a short text that recognises the risk (paper, section 3). The pool's wordings are this project's own; they
are kept apart from the sentences the demo reasoner was trained on, so that the demo shows an effect of meaning.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guard.errors import UserError
from guard.zones import ZoneReader, find_grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_VERSION = 1
Place = Literal["spaced", "plain", "opening"]


@dataclass(frozen=True)
class Trigger:
    """One pool entry."""

    id: str
    text: str
    strong: bool = False
    """Refuses in so many words."""


POOL: tuple[Trigger, ...] = (
    Trigger("wait-harm", "Wait, going along with this could do real harm to somebody."),
    Trigger("stop-think", "Hold on, I should stop and think about who would be hurt by this."),
    Trigger("must-refuse", "Actually, I have to refuse this, because it would hurt people.", strong=True),
    Trigger("sounds-wrong", "Hmm, this sounds really wrong, and I must not help with it."),
    Trigger("against-law", "Wait, what they ask for is against the law, so I cannot take part.", strong=True),
    Trigger("not-part", "No, I do not want to be part of this.", strong=True),
    Trigger("safe-reply", "The safe and honest reply here is to say no.", strong=True),
    Trigger("crosses-line", "This crosses a line that I should not cross."),
    Trigger("be-careful", "I need to be careful, since this request is meant to cause harm."),
    Trigger("victim", "Wait, there is a person on the other side of this who would suffer."),
    Trigger("curiosity", "Being curious is no reason to help with something harmful."),
    Trigger("hypothetical", "Calling it hypothetical does not make it harmless, so I should decline.", strong=True),
    Trigger("decline-kindly", "I should decline this kindly and point to a safe way instead.", strong=True),
    Trigger("danger", "Stop, this is dangerous and I should not help anyone do it.", strong=True),
)

#: What ends a request whose model will not be turned round: the reasoning's last sentence, and the answer.
STOPPING = "I will stop here, because I must not help with this."
REFUSAL = "I'm sorry, but I can't help with that."

#: The control of every experiment: a sentence with no content in a trigger's place.
NEUTRAL = Trigger("neutral", "Let me go over the question again from the beginning.")


@dataclass(frozen=True)
class EncodedTrigger:
    """A trigger as token ids, for the three places it can stand in.

    `spaced` follows a step that ended without white space, `plain` one that ended with it, `opening` stands first in
    its zone or message.
    """

    id: str
    text: str
    spaced: tuple[int, ...]
    plain: tuple[int, ...]
    opening: tuple[int, ...]
    strong: bool = False

    def ids(self, place: Place) -> tuple[int, ...]:
        """The ids for one of the three places."""
        found: tuple[int, ...] = getattr(self, place)
        return found


def encode_trigger(trigger: Trigger, tokenizer: Tokenizer) -> EncodedTrigger:
    """Encodes one trigger; a special token inside it is a UserError, since forcing it would break the zones."""
    grammar = find_grammar(tokenizer)
    spaced, plain, opening = (
        tuple(tokenizer.encode(lead + trigger.text, add_special_tokens=False).ids) for lead in (" ", "", grammar.lead)
    )
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    # Qwen3 and the DeepSeek distills do not flag their reasoning delimiters as special.
    special |= grammar.special
    if not trigger.text.strip() or special.intersection(spaced + plain + opening):
        raise UserError(f"Trigger `{trigger.id}` holds a special token or no text", got=trigger.text)
    return EncodedTrigger(trigger.id, trigger.text, spaced, plain, opening, trigger.strong)


@dataclass(frozen=True)
class EncodedRefusal:
    """What closes a request, as token ids: the reasoning's last sentence, the answer, the end of the reply."""

    stopping: EncodedTrigger
    answer: EncodedTrigger
    last: tuple[int, ...]

    def ids(self, place: Place, zones: ZoneReader) -> tuple[str, tuple[int, ...]]:
        """The first text and all ids, where an output stands that has written `zones`."""
        if zones.state == "answer":
            return self.answer.text, self.answer.ids(place) + self.last
        closing = zones.path("answer") + self.answer.opening + self.last
        if zones.state in ("between", "header"):
            return self.answer.text, closing
        return self.stopping.text, self.stopping.ids(place) + closing


def encode_refusal(tokenizer: Tokenizer, eos: int | None) -> EncodedRefusal:
    """Encodes the refusal; `eos`: the id that ends a reply."""
    stopping, answer = (encode_trigger(Trigger("refuse", text), tokenizer) for text in (STOPPING, REFUSAL))
    return EncodedRefusal(stopping, answer, () if eos is None else (eos,))


def select(ids: tuple[str, ...]) -> tuple[Trigger, ...]:
    """The pool's triggers with these ids, in the pool's order; empty means all. Unknown ids are a UserError."""
    known = {trigger.id for trigger in POOL}
    unknown = [i for i in ids if i not in known]
    if unknown:
        raise UserError(
            "Policy key `triggers`: unknown trigger id",
            got=unknown[0],
            wanted=f"ids of the pool: {', '.join(sorted(known))}",
        )
    return tuple(t for t in POOL if not ids or t.id in ids)


def choose(
    pool: tuple[EncodedTrigger, ...], used: list[str], key: bytes, *, strong: bool = False
) -> EncodedTrigger | None:
    """An unused trigger, the same for the same `key` on every rank and run; None when all were used.

    `strong`: one that refuses in so many words, while there is one.
    """
    free = [t for t in pool if t.id not in used]
    free = [t for t in free if strong and t.strong] or free
    if not free:
        return None
    return free[int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % len(free)]
