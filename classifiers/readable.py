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

import numpy as np
import numpy.typing as npt

from classifiers.normalise import MAX_CHARS, normalise

TABLE = Path(__file__).parent / "banks" / "letter_pairs.json"
LIMIT = -3.15
"""Mean log probability of a letter pair, in nats, below which a text is unreadable; chosen by `docs/design/0005`."""
MIN_LETTERS = 24
"""A shorter text says too little."""
_RUN = re.compile(r"[A-Za-z0-9+]{32,}")
"""Without / - _, which paths and names are full of; base64 has a slash once in 64 characters."""
_LETTERS = re.compile(r"[a-z]+")
_SYMBOLS = 27
"""The end of a word, a to z."""
_CODE_OF = np.zeros(256, np.intp)
_CODE_OF[97:123] = np.arange(1, _SYMBOLS)
_SPACE = "`"
"""Stands for the end of a word: the character before `a`."""


def unreadable(text: str) -> bool:
    """Whether a step looks enciphered or encoded rather than written."""
    if any(_is_encoded(run) for run in _RUN.findall(text[:MAX_CHARS])):
        return True
    codes = _codes(text)
    letters = int(np.count_nonzero(codes))
    if letters < MIN_LETTERS or 2 * letters < len("".join(text.split())):
        return False
    return _mean(codes) < LIMIT


def _is_encoded(run: str) -> bool:
    """Whether a long run mixes capitals, small letters and digits as base64 does and names do not."""
    kinds = (sum(map(str.isdigit, run)), sum(map(str.isupper, run)), sum(map(str.islower, run)))
    return kinds[0] >= 3 and min(kinds[1:]) >= 5


def _codes(text: str) -> npt.NDArray[np.intp]:
    """The scorer's view of a text, letter by letter: 1 to 26, and 0 for everything between words and around them."""
    return _CODE_OF[np.frombuffer(f" {normalise(text)} ".encode(), np.uint8)]


def _mean(codes: npt.NDArray[np.intp]) -> float:
    pairs = codes[:-1] * _SYMBOLS + codes[1:]
    pairs = pairs[pairs > 0]
    # Whole thousandths: their sum is exact, so every machine finds the same mean.
    return float(_thousandths()[pairs].sum()) / (1000 * len(pairs)) if len(pairs) else 0.0


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
def _thousandths() -> npt.NDArray[np.int64]:
    table: list[list[float]] = json.loads(TABLE.read_text(encoding="utf-8"))
    thousandths: npt.NDArray[np.int64] = np.rint(1000 * np.array(table)).astype(np.int64).ravel()
    return thousandths
