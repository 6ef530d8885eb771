"""Whether a step can be read at all: ROT13, base64 and other ciphers cannot be cleared by a classifier of words.

A table of letter pairs, counted on the authored traces in six languages of the Latin alphabet, says how likely a text's
letters follow each other. Other scripts are left to the detector.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from classifiers.normalise import MAX_CHARS, normalise

TABLE = Path(__file__).parent / "banks" / "letter_pairs.json"
LIMIT = -3.15
"""Mean log probability of a letter pair, in nats, below which a text is unreadable; chosen by `docs/design/0005`."""
MIN_LETTERS = 24
"""A shorter text says too little."""
_RUN = re.compile(r"[A-Za-z0-9+]{32,}")
"""Without / - _, which paths and names are full of; base64 has a slash once in 64 characters."""
_LETTERS = re.compile(r"[a-z]+")
_SPACE = "`"
"""Stands for the end of a word: the character before `a`."""


def unreadable(text: str) -> bool:
    """Whether a step looks enciphered or encoded rather than written."""
    if any(_is_encoded(run) for run in _RUN.findall(text[:MAX_CHARS])):
        return True
    words = _words(text)
    letters = sum(map(len, words))
    if letters < MIN_LETTERS or 2 * letters < len("".join(text.split())):
        return False
    return likelihood(words) < LIMIT


def _is_encoded(run: str) -> bool:
    """Whether a long run mixes capitals, small letters and digits as base64 does and names do not."""
    kinds = (sum(map(str.isdigit, run)), sum(map(str.isupper, run)), sum(map(str.islower, run)))
    return kinds[0] >= 3 and min(kinds[1:]) >= 5


def likelihood(words: Iterable[str]) -> float:
    """Return the mean log probability, in nats, of the letter pairs of words, their ends included."""
    table = _table()
    values = [table[ord(a) - 96][ord(b) - 96] for word in words for a, b in _pairs(word)]
    return sum(values) / len(values) if values else 0.0


def count_pairs(texts: Iterable[str]) -> list[list[float]]:
    """Return log probabilities [27, 27] of a letter given the one before, with one added to each count."""
    counts = Counter(pair for text in texts for word in _words(text) for pair in _pairs(word))
    symbols = [_SPACE, *map(chr, range(97, 123))]
    rows = []
    for a in symbols:
        total = sum(counts[a, b] + 1 for b in symbols)
        rows.append([round(math.log((counts[a, b] + 1) / total), 3) for b in symbols])
    return rows


def _words(text: str) -> list[str]:
    return _LETTERS.findall(normalise(text))


def _pairs(word: str) -> Iterable[tuple[str, str]]:
    return zip(_SPACE + word, word + _SPACE, strict=True)


@cache
def _table() -> list[list[float]]:
    table: list[list[float]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
