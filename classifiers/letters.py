"""How likely a text's letters follow each other.

A table of letter pairs, counted on the authored traces in six languages of the Latin alphabet. Accents do not count:
"é" is read as "e".
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "banks" / "letter_pairs.json"
SYMBOLS = 27
"""The end of a word, a to z."""
CODES = bytes(i - 96 if 97 <= i < 97 + 26 else 0 for i in range(256))
"""By a byte its symbol: whatever is no letter ends a word."""
_PAIR, _LETTER = 1 << 28, 1 << 44
"""In a sum letters are counted by the second, pairs by the first; below lie thousandths of a nat, as a negative number.
Some 2,000 letters fit."""
_UNMARKED = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ħ": "h", "ŋ": "n", "ə": "e"}
)
"""Letters that Unicode does not take apart."""
_MOST_SUMS = 1 << 15
"""Words that are remembered."""


class Likelihood(NamedTuple):
    """Of a text: its letters a to z, its pairs of neighbours that hold a letter, and their mean log probability."""

    letters: int
    pairs: int
    mean: float
    """In nats; 0 where there is no pair."""


def likelihood(words: Sequence[str], *, remember: bool = False) -> Likelihood:
    """That of normalised words; whole thousandths of a nat are added up, so that every machine finds the same mean.

    `remember`: words of a usual length, which come again and again.
    """
    letters, rest = divmod(sum(map(_SUMS.__getitem__ if remember else _sum_of, words)) + _PAIR - 1, _LETTER)
    pairs, rest = divmod(rest, _PAIR)
    return Likelihood(letters, pairs, (rest + 1 - _PAIR) / (1000 * pairs) if pairs else 0.0)


def plain(text: str) -> str:
    """A normalised text without accents."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text.translate(_UNMARKED)) if not unicodedata.combining(c))


def symbols(text: str) -> bytes:
    """A plain text's symbols, with the end of a word on both sides."""
    return b"\0" + text.encode("utf-8", "replace").translate(CODES) + b"\0"


def _sum_of(word: str) -> int:
    """Letters, pairs and the sum of the pairs' thousandths of a nat, as one number."""
    codes = symbols(plain(word))
    table = _pair_table()
    total = _LETTER * (len(codes) - codes.count(0))
    for pair in pairwise(codes):
        total += table[pair]
    return total


class _Sums(dict[str, int]):
    """Of words that were seen. Emptied when it is full: keeping an order of use costs more than all the look-ups."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_SUMS:
            self.clear()
        found = self[word] = _sum_of(word)
        return found


_SUMS = _Sums()


def count_pairs(texts: Iterable[str]) -> list[list[float]]:
    """Return log probabilities [27, 27] of a letter given the one before, of normalised texts, one added to counts."""
    counts = Counter(pair for text in texts for pair in pairwise(symbols(plain(text))))
    # The end of a word does not follow itself.
    del counts[0, 0]
    rows = []
    for a in range(SYMBOLS):
        total = sum(counts[a, b] + 1 for b in range(SYMBOLS))
        rows.append([round(math.log((counts[a, b] + 1) / total), 3) for b in range(SYMBOLS)])
    return rows


@cache
def table() -> list[list[int]]:
    """Thousandths of a nat by symbol and next symbol; the end of a word after itself counts nothing."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return [[round(1000 * rows[a][b]) if a or b else 0 for b in range(SYMBOLS)] for a in range(SYMBOLS)]


@cache
def _pair_table() -> dict[tuple[int, int], int]:
    """What a pair of symbols adds to a sum."""
    return {(a, b): _PAIR + cell if a or b else 0 for a, row in enumerate(table()) for b, cell in enumerate(row)}
