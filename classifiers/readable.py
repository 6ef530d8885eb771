"""Whether a step can be read at all: ROT13, base64 and other ciphers cannot be cleared by a classifier of words.

A table of letter pairs, counted on the authored traces in six languages of the Latin alphabet, says how likely a text's
letters follow each other. Other scripts are left to the detector.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
_CODE_OF = np.zeros(256, np.intp)
_CODE_OF[97:123] = np.arange(1, _SYMBOLS)
_NO_LETTERS = bytes(i for i in range(256) if not _CODE_OF[i])
_COUNTED = 1 << 40
"""In a sum of table entries the pairs are counted above this, the thousandths of a nat summed below."""
_SPACE = "`"
"""Stands for the end of a word: the character before `a`."""


def unreadable(text: str) -> bool:
    """Whether a step looks enciphered or encoded rather than written."""
    lengths = [len(word) for word in text.split()]
    if max(lengths, default=0) >= _LONG and any(_is_encoded(run) for run in _RUN.findall(text[:MAX_CHARS])):
        return True
    view = f" {normalise(text)} ".encode()
    letters = len(view.translate(None, _NO_LETTERS))
    if letters < MIN_LETTERS or 2 * letters < sum(lengths):
        return False
    return _mean(view) < LIMIT


def _is_encoded(run: str) -> bool:
    """Whether a long run mixes capitals, small letters and digits as base64 does and names do not."""
    kinds = (sum(map(str.isdigit, run)), sum(map(str.isupper, run)), sum(map(str.islower, run)))
    return kinds[0] >= 3 and min(kinds[1:]) >= 5


def _mean(view: bytes) -> float:
    """Mean log probability of the pairs of neighbours that hold a letter; whatever is none stands between words."""
    even = np.frombuffer(view, np.uint16, len(view) // 2)
    odd = np.frombuffer(view, np.uint16, (len(view) - 1) // 2, offset=1)
    table = _pair_table()
    # Whole thousandths: their sum is exact, so every machine finds the same mean.
    total = int(table[even].sum()) + int(table[odd].sum())
    count, thousandths = divmod(total, _COUNTED)
    # The sum of thousandths is negative: it borrowed one from the count.
    return (thousandths - _COUNTED) / (1000 * (count + 1)) if thousandths else 0.0


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
def _pair_table() -> npt.NDArray[np.int64]:
    """By two neighbouring bytes as one number: thousandths of a nat, and `_COUNTED` for a pair that counts."""
    table = np.rint(1000 * np.array(json.loads(TABLE.read_text(encoding="utf-8")))).astype(np.int64)
    first, second = np.arange(1 << 16) & 255, np.arange(1 << 16) >> 8
    if sys.byteorder == "big":
        first, second = second, first
    a, b = _CODE_OF[first], _CODE_OF[second]
    counted: npt.NDArray[np.int64] = np.where((a > 0) | (b > 0), table[a, b] + _COUNTED, 0)
    return counted
