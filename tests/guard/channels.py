"""A channel format (Harmony) in a small real tokenizer whose every id is known; `kit` drives its monitors."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.zones import ZoneReader
from tests.guard import kit

SPECIAL = (
    "<|endoftext|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>",
)  # fmt: skip
START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL = range(1, 8)
NAMES = "assistant user system analysis final commentary json to=functions.x"
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') +"
    " '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """The ids of `SPECIAL` first, then what `kit.byte_level` gives."""
    return kit.byte_level((*kit.TEXTS, NAMES, *NAMES.split()), SPECIAL)


def encode(text: str) -> list[int]:
    """Ids of a text; marks in it become special."""
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def letters(text: str) -> list[int]:
    """The same text in ordinary tokens of one byte each."""
    spell = kit.byte_level((), special=())
    return [kit.token_id(tokenizer(), spell.id_to_token(i)) for i in spell.encode(text).ids]


@functools.cache
def runtime(policy: Policy | None = None) -> GuardRuntime:
    """A real runtime over `tokenizer()`; a reply ends with `<|return|>`."""
    return GuardRuntime.build(policy or Policy(), kit.WordDetector(), tokenizer(), "channels", RETURN)


def reader(text: str = "") -> ZoneReader:
    """A reader that has read a text."""
    found = runtime().zones()
    for token in encode(text):
        found.feed(token)
    return found


def monitor(policy: Policy | None = None, *, prompt: str = "<|start|>assistant", request: str = "car") -> StepMonitor:
    """A fresh monitor behind a prompt."""
    return StepMonitor(runtime(policy), request, zones=reader(prompt), guard_id="kit")
