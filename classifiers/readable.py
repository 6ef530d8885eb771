"""Whether a step can be read at all: ROT13, base64 and other ciphers cannot be cleared by a classifier of words.

What is written in another language, code, keys and tables can be read, and is left to the detector.
"""

from __future__ import annotations

import re

from classifiers.ciphers import is_enciphered
from classifiers.codes import hides_characters, is_encoded
from classifiers.letters import likelihood
from classifiers.normalise import normalise

LIMIT = -2.9
"""Mean log probability of a letter pair, in nats, from which a text plainly is writing: 99.5 % of the authored test
steps, so the rest is looked at more closely."""
MIN_LETTERS = 24
"""A shorter text says too little."""
_WIDE = 12
"""Characters a word, above which a text is not made of usual words."""
_SPELLED = 32
"""Letters of a step that is spelled out letter by letter."""
_READS = -3.3
"""The limit for such a word."""
_LETTERS = re.compile(r"[^\W\d_]+")
_SINGLE = re.compile(r"(?<![^\W_])[^\W\d_](?![^\W_])")


def unreadable(text: str) -> bool:
    """Whether a step looks enciphered or encoded rather than written; 5 us for plain writing."""
    view = normalise(text)
    words = view.split()
    wide = len(view) > _WIDE * len(words)
    if not text.isascii() and hides_characters(text):
        return True
    found = likelihood(words, remember=not wide)
    if found.letters < MIN_LETTERS or 2 * found.letters < len(view):
        return is_encoded(text)
    if wide and _is_spelled(text, view):
        return True
    return found.mean < LIMIT and (is_enciphered(text, view) or is_encoded(text))


def _is_spelled(text: str, view: str) -> bool:
    """Whether most of a text is one word that only its view holds, so that nothing says where its words end."""
    longest = max(_LETTERS.findall(view), key=len)
    if len(longest) < max(_SPELLED, len(view) / 2):
        return False
    return len(_SINGLE.findall(text)) >= _SPELLED and likelihood([longest]).mean >= _READS
