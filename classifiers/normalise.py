"""The scorer's view of a text: one spelling for many disguises.

Only the scorer reads this view; logs and traces keep the raw text. Every pass is linear in the text's length, and the
length is cut first, so a hostile text costs no more than a long one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARS = 2000

_LOOKALIKES = {
    # Cyrillic
    "а": "a", "в": "b", "е": "e", "ё": "e", "һ": "h", "і": "i", "ї": "i", "ј": "j", "к": "k", "м": "m", "н": "h",
    "о": "o", "р": "p", "с": "c", "ѕ": "s", "т": "t", "у": "y", "ү": "y", "х": "x", "ԁ": "d", "ԛ": "q", "ԝ": "w",
    "ь": "b", "ӏ": "l",
    # Greek
    "α": "a", "β": "b", "γ": "y", "ε": "e", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ο": "o", "ρ": "p", "τ": "t",
    "υ": "u", "χ": "x", "ω": "w",
    # Latin letters that NFKC leaves alone, and typographic marks
    "ɑ": "a", "ɡ": "g", "ı": "i", "ʟ": "l", "ɴ": "n", "ʀ": "r",
    "’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‐": "-",
    # letters of category Lo that render as nothing
    "\u115f": "", "\u1160": "", "\u3164": "", "\uffa0": "",
}  # fmt: skip
_TABLE = str.maketrans(_LOOKALIKES)
_STACKED_MARKS = re.compile("[\u0300-\u036f\u20d0-\u20ff\ufe00-\ufe0f]+")
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W\d_][ .\-_*]){2,}[^\W\d_](?![^\W_])")
_SHAPE = bytes(97 if chr(i).isalpha() else 32 if chr(i) in " .-_*" else 48 for i in range(128)) + bytes(128)
"""A letter as `a`, what may stand between spaced letters as a blank."""
_SEPARATORS = re.compile(r"[ .\-_*]")
# Digits that stand for letters inside a word: a digit between letters, or letters between digits.
_LEET_WORD = re.compile(r"(?<![^\W_])(?=[a-z0-9]*(?:[a-z][0-9]+[a-z]|[0-9][a-z]+[0-9]))[a-z0-9]{2,24}(?![^\W_])")
_DIGIT = re.compile("[0-9]")
_LEET = str.maketrans("431057", "aeiost")
_REMEMBERED = 4096
"""Characters; a text may hold any."""
_CONTROL = {"Cf", "Cc", "Co", "Cn", "Cs"}


def normalise(text: str, limit: int = MAX_CHARS) -> str:
    """Return the scorer's view of `text`: folded, undisguised, single-spaced.

    NFKC, casefold, format characters and stacked marks dropped, Cyrillic and Greek look-alikes written in Latin, runs
    of three or more spaced single letters joined ("h a c k" is "hack"), digits inside words read as the letters they
    look like ("h4ck" is "hack", "mp3" and "12kg" stay), whitespace collapsed. At most `limit`
    characters are read and at most `limit` returned.
    """
    return _view(text[:limit], limit)


@lru_cache(maxsize=1024)
def _view(text: str, limit: int) -> str:
    # Cached: the first tier, the encoder and the check for ciphers all read the same step.
    if not text.isascii():
        text = _undisguise(text)[:limit]
    text = text.lower().replace("`", "'")
    # Both patterns are dear, and most texts hold neither: 21 us without these two looks, 4 with them.
    if not text.isascii() or b"a a a" in text.encode().translate(_SHAPE):
        text = _SPACED.sub(_join, text)
    if _DIGIT.search(text):
        text = _LEET_WORD.sub(lambda word: word.group().translate(_LEET), text)
    return " ".join(text.split())


class _Kept(dict[int, int | None]):
    """For `str.translate`: format and control characters go, white space and the rest stay."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        kept = code if char.isspace() or unicodedata.category(char) not in _CONTROL else None
        if len(self) < _REMEMBERED:
            self[code] = kept
        return kept


_KEPT = _Kept()


def _undisguise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.translate(_KEPT)
    # After NFKC a mark that composes is part of its letter; what is left was stacked to break the word.
    return _STACKED_MARKS.sub("", text).translate(_TABLE)


def _join(match: re.Match[str]) -> str:
    return _SEPARATORS.sub("", match.group())
