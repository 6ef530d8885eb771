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
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from classifiers.normalise import MAX_CHARS, normalise

TABLE = Path(__file__).parent / "banks" / "letter_pairs.json"
LIMIT = -3.15
"""Mean log probability of a letter pair, in nats, below which a text is unreadable; chosen by `docs/design/0005`."""
MIN_LETTERS = 24
"""A shorter text says too little."""
_LONG = 32
_RUN = re.compile(rf"[A-Za-z0-9+]{{{_LONG},}}")
"""Without / - _, which paths and names are full of; base64 has a slash once in 64 characters."""
_LETTERS = re.compile(r"[a-z]+")
_SYMBOLS = 27
"""The end of a word, a to z."""
_CODES = bytes(i - 96 if 97 <= i < 97 + 26 else 0 for i in range(256))
"""By a byte its symbol: whatever is no letter ends a word."""
_PAIR, _LETTER = 1 << 28, 1 << 44
"""In a sum letters are counted by the second, pairs by the first; below lie thousandths of a nat, as a negative number.
`MAX_CHARS` letters fit."""
_SPACE = "`"
"""Stands for the end of a word: the character before `a`."""


def unreadable(text: str) -> bool:
    """Whether a step looks enciphered or encoded rather than written."""
    words = text.split()
    longest = max(map(len, words), default=0)
    if longest >= _LONG and any(_is_encoded(run) for run in _RUN.findall(text[:MAX_CHARS])):
        return True
    # Words come again and again: their sums are remembered.
    total = sum(map(_pairs_of if longest >= _LONG else _known, normalise(text).split()))
    letters, rest = divmod(total + _PAIR - 1, _LETTER)
    if letters < MIN_LETTERS or 2 * letters < len("".join(words)):
        return False
    pairs, rest = divmod(rest, _PAIR)
    return (rest + 1 - _PAIR) / (1000 * pairs) < LIMIT


def _is_encoded(run: str) -> bool:
    """Whether a long run mixes capitals, small letters and digits as base64 does and names do not."""
    kinds = (sum(map(str.isdigit, run)), sum(map(str.isupper, run)), sum(map(str.islower, run)))
    return kinds[0] >= 3 and min(kinds[1:]) >= 5


def _pairs_of(word: str) -> int:
    """Letters, pairs of neighbours that hold a letter, and the sum of these pairs' thousandths of a nat, as one number.

    Whole thousandths: their sum is exact, so every machine finds the same mean.
    """
    codes = b"\0" + word.encode("utf-8", "replace").translate(_CODES) + b"\0"
    table = _pair_table()
    total = _LETTER * (len(codes) - codes.count(0))
    for pair in pairwise(codes):
        total += table[pair]
    return total


_known = lru_cache(maxsize=1 << 15)(_pairs_of)


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
def _pair_table() -> dict[tuple[int, int], int]:
    """What a pair of symbols adds to a sum."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    symbols = range(_SYMBOLS)
    return {(a, b): _PAIR + round(1000 * table[a][b]) if a or b else 0 for a in symbols for b in symbols}
