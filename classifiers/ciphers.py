"""Enciphered writing: letters that stand for other letters, or stand in reverse.

Whether letters follow each other as in writing depends on the language, and the table of letter pairs knows six. So a
text is called enciphered only if one way to decipher it reads much better than the text does, or if it is worse than
what any language was seen to be. All numbers are chosen by measurement (`docs/design/0005`).
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import numpy.typing as npt

from classifiers.letters import SYMBOLS, plain, symbols, table

_READS = -2.95
"""Mean log probability of a letter pair, in nats, from which a deciphered text reads like a language."""
_GAIN, _EVIDENCE = 0.45, 24.0
"""What deciphering must gain, in nats a pair and altogether: Slovene read backwards gains 0.5 in short texts."""
_NO_LANGUAGE = -4.0
"""Below lie one of 9,000 sentences in other languages, and nine of ten in a random alphabet or Vigenere's."""
_OTHER = 0.1
"""Share of letters that are none of a to z, from which a text is another alphabet's."""
_PLAIN_WORDS, _ALL_PLAIN = 0.5, 0.85
"""Shares of words that are nothing but letters: code has fewer."""
_FEW, _SHORT, _TALL = 6, 3.3, 12
"""Words, and letters a word: fewer may be a list of abbreviations, more are keys."""
_KINDS = 12
"""Different pairs of letters, below which a text says nothing."""
_LETTERS = re.compile("[a-z]+")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_MARKS = ".,;:!?…\"'()[]*`“”‘’«»-"


def is_enciphered(text: str, view: str) -> bool:
    """Whether a text, of which the scorer sees `view`, is a cipher's; about 50 us."""
    view = plain(view)
    others = 0 if view.isascii() else sum(char.isalpha() and not char.isascii() for char in view)
    # A word that comes again says nothing new.
    found, counts = _pairs(" ".join(sorted(set(_LETTERS.findall(view)))))
    pairs = int(counts.sum())
    letters = int(counts[found % SYMBOLS > 0].sum())
    if len(found) < _KINDS or others > _OTHER * (letters + others):
        return False
    scores = (_decipherings()[found] * counts[:, None]).sum(axis=0).tolist()
    own, best = scores[0] / (1000 * pairs), max(scores[1:]) / (1000 * pairs)
    words, plain_words = _words(text)
    if best >= _READS and best - own >= max(_GAIN, _EVIDENCE / pairs):
        return plain_words >= _PLAIN_WORDS * words
    shaped = words >= _FEW and _SHORT * words <= letters <= _TALL * words
    return own < _NO_LANGUAGE and plain_words >= _ALL_PLAIN * words and shaped


def _words(text: str) -> tuple[int, int]:
    """How many words there are, and how many of them are written in letters of one case or with a capital."""
    words = [word for word in (word.strip(_MARKS) for word in text.split()) if word]
    return len(words), sum(
        _WORD.fullmatch(word) is not None and (word.islower() or word.isupper() or word[1:].islower()) for word in words
    )


def _pairs(text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The different pairs of a text, as first symbol times 27 and second, and how often each comes."""
    codes = np.frombuffer(symbols(text), np.uint8).astype(np.int64)
    counts = np.bincount(codes[:-1] * SYMBOLS + codes[1:], minlength=SYMBOLS**2)
    counts[0] = 0
    found = counts.nonzero()[0]
    return found, counts[found]


@cache
def _decipherings() -> npt.NDArray[np.int64]:
    """Thousandths of a nat [729, 104] of each pair under each deciphering, the text as it stands first.

    All shifts of the alphabet and of the reversed alphabet (Atbash), each also with the letters in reverse.
    """
    rows = np.array(table(), np.int64)
    letters = np.arange(SYMBOLS - 1)
    found = []
    for alphabet in (letters, letters[::-1]):
        for shift in range(SYMBOLS - 1):
            order = np.concatenate([[0], 1 + (alphabet + shift) % (SYMBOLS - 1)])
            shifted = rows[np.ix_(order, order)]
            found += [shifted.reshape(-1), shifted.T.reshape(-1)]
    return np.stack(found, axis=1)
