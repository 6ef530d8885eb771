"""The pool of safety triggers, and how one is chosen.

A trigger is a short text that recognises the risk (paper, section 3). The pool's wordings are this project's own; they
are kept apart from the sentences the demo reasoner was trained on, so that the demo shows an effect of meaning.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guard.errors import UserError
from guard.steps import find_delimiters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_VERSION = 1


@dataclass(frozen=True)
class Trigger:
    """One pool entry."""

    id: str
    text: str


POOL: tuple[Trigger, ...] = (
    Trigger("wait-harm", "Wait, going along with this could do real harm to somebody."),
    Trigger("stop-think", "Hold on, I should stop and think about who would be hurt by this."),
    Trigger("must-refuse", "Actually, I have to refuse this, because it would hurt people."),
    Trigger("sounds-wrong", "Hmm, this sounds really wrong, and I must not help with it."),
    Trigger("against-law", "Wait, what they ask for is against the law, so I cannot take part."),
    Trigger("not-part", "No, I do not want to be part of this."),
    Trigger("safe-reply", "The safe and honest reply here is to say no."),
    Trigger("crosses-line", "This crosses a line that I should not cross."),
    Trigger("be-careful", "I need to be careful, since this request is meant to cause harm."),
    Trigger("victim", "Wait, there is a person on the other side of this who would suffer."),
    Trigger("curiosity", "Being curious is no reason to help with something harmful."),
    Trigger("hypothetical", "Calling it hypothetical does not make it harmless, so I should decline."),
    Trigger("decline-kindly", "I should decline this kindly and point to a safe way instead."),
    Trigger("danger", "Stop, this is dangerous and I should not help anyone do it."),
)

#: The control of every experiment: a sentence with no content in a trigger's place.
NEUTRAL = Trigger("neutral", "Let me go over the question again from the beginning.")


@dataclass(frozen=True)
class EncodedTrigger:
    """A trigger as token ids, for the three places it can stand in.

    `spaced` follows a step that ended without white space, `plain` one that ended with it, `opening` is an answer's
    first line.
    """

    id: str
    text: str
    spaced: tuple[int, ...]
    plain: tuple[int, ...]
    opening: tuple[int, ...]


def encode_trigger(trigger: Trigger, tokenizer: Tokenizer) -> EncodedTrigger:
    """Encodes one trigger; a special token inside it is a UserError, since forcing it would break the zones."""
    spaced, plain, opening = (
        tuple(tokenizer.encode(lead + trigger.text, add_special_tokens=False).ids) for lead in (" ", "", "\n")
    )
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    # Qwen3 and the DeepSeek distills do not flag their reasoning delimiters as special.
    delimiters = find_delimiters(tokenizer)
    special |= {i for i in (delimiters.start, delimiters.end) if i is not None}
    if not trigger.text.strip() or special.intersection(spaced + plain + opening):
        raise UserError(f"Trigger `{trigger.id}` holds a special token or no text", got=trigger.text)
    return EncodedTrigger(trigger.id, trigger.text, spaced, plain, opening)


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


def choose(pool: tuple[EncodedTrigger, ...], used: list[str], key: bytes) -> EncodedTrigger | None:
    """An unused trigger, the same for the same `key` on every rank and run; None when all were used."""
    free = [t for t in pool if t.id not in used]
    if not free:
        return None
    return free[int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % len(free)]
