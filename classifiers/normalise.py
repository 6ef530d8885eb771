"""The scorer's view of a text: one spelling for many disguises.

Only the scorer reads this view; logs and traces keep the raw text. Every pass is linear in the text's length, of which
a limited part is read, so a hostile text costs no more than a long one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from classifiers.letters import likelihood

MAX_CHARS = 2000
_READ = 16
"""Times the limit: what is read of a longer text, whose runs are then collapsed."""
_PIECE = 256
"""Characters that are composed at once: the time that NFKC takes for stacked marks grows by the square."""

_LOOKALIKES = {
    # Cyrillic
    "а": "a", "в": "b", "е": "e", "ё": "e", "һ": "h", "і": "i", "ї": "i", "ј": "j", "к": "k", "м": "m", "н": "h",
    "о": "o", "р": "p", "с": "c", "ѕ": "s", "т": "t", "у": "y", "ү": "y", "х": "x", "ԁ": "d", "ԛ": "q", "ԝ": "w",
    "ь": "b", "ӏ": "l",
    # Greek
    "α": "a", "β": "b", "γ": "y", "ε": "e", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ο": "o", "ρ": "p", "τ": "t",
    "υ": "u", "χ": "x", "ω": "w",
    # Latin letters that NFKC leaves alone, and typographic marks
    "ɑ": "a", "ɡ": "g", "ı": "i",
    "’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‐": "-",
    # letters of category Lo that render as nothing, and a blank pattern of Braille
    "\u115f": "", "\u1160": "", "\u3164": "", "\uffa0": "", "\u2800": " ",
    # small capitals
    **dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnopqrstuvwyz", strict=True)),
    # letters in black circles and squares, and those that flags are made of
    **{chr(first + i): chr(97 + i) for first in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)},
}  # fmt: skip
_TABLE = str.maketrans(_LOOKALIKES)
_STACKED_MARKS = re.compile("[\u0300-\u036f\u20d0-\u20ff\ufe00-\ufe0f\U000e0100-\U000e01ef]+")
_REPEATED = re.compile(r"([!-/:-@\[-`{-~])\1{3,}")
_ANY_REPEATED = re.compile(r"(.)\1{3,}")
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W\d_][ .\-_*]){2,}[^\W\d_](?![^\W_])")
_WIDE = re.compile(r"(?<![^\W_])[^\W\d_]( {2,4})[^\W\d_](?:\1[^\W\d_])+(?![^\W_])")
# Lists, sums and columns of single letters look the same: these are joined only if they might be a word.
_LISTED = re.compile(r"(?<![\w=^(\[{])[^\W\d_]( ?[/|,+~:;] ?|[\t\n]| [.\-_*] )[^\W\d_](?:\1[^\W\d_]){2,}(?![\w=^)\]}])")
_NO_LETTERS = re.compile(r"[\W\d_]+")
_GAPS = re.compile(" +")
_SPREAD, _SINGLES = 8, 0.8
"""Words of a text that is spread out, and share of single letters among them."""
_JOINED = re.compile(r"(?<=[a-z])[_\-./|+~,](?=[a-z])")
_WORDLIKE = -2.9
"""Mean log probability of a word's letter pairs, in nats, from which it may be one: 92 % of the authored traces' words
of four letters and more, 4 % of random letters."""
_LONG = 9
"""Characters a word from which a text's words might be joined by something else than blanks; English has 6."""
# Digits that stand for letters inside a word: a digit between letters, or letters between digits.
_LEET_WORD = re.compile(r"(?<![^\W_])(?=[a-z0-9]*(?:[a-z][0-9]+[a-z]|[0-9][a-z]+[0-9]))[a-z0-9]{2,24}(?![^\W_])")
_DIGITS = re.compile("[0-9]+")
_LEET_LENGTH = 12
_LEET, _LEET_MORE = str.maketrans("431057", "aeiost"), str.maketrans("431057892", "aeiostbgz")
"""The latter for a word with two groups of digits: "k8s", "p2p" and "8d6" stay, and so does what is longer."""
_LEET_ALL = _LEET_MORE | str.maketrans("@$", "as")
_LEET_WORDS, _LEET_SHARE = 3, 0.2
"""Words, and share of a text's words, that digits stand inside of and that read like words without them: then all of
its digits are letters, those at a word's edge and those by themselves too ("4nd", "70")."""
# "h@ck", "pa$$word", "k!ll"; a sign at a word's beginning or end marks a name, a price, an exclamation.
_SIGNED_WORD = re.compile(
    r"(?<![^\s(\"'])[a-z0-9]*[a-z](?:(?:@{1,3}[0-9]*|[$!]{1,3})[a-z][a-z0-9]*)+(?=[.,;:?!)\"']*(?:\s|$))"
)
_SIGNS = str.maketrans("@$!", "asi")
_BLANKS = " .-_*/|,+~:;\t\n"
_SHAPE = bytes(
    ord("a" if char.isalpha() else "0" if char.isdigit() else " " if char in _BLANKS else "!" if char in "@$!" else "?")
    for char in map(chr, range(128))
) + b"a" * 128  # fmt: skip
"""What stands where in a text, by the first byte of each character: one look says that most texts hold no disguise."""
_INNER = bytes(range(0x80, 0xC0))
_SINGLE_LETTERS = tuple(f" a{' ' * gap}a " for gap in range(1, 5))
_VIEWED = 1024
"""Texts."""
_REMEMBERED = 4096
"""Characters; a text may hold any."""
_CONTROL = {"Cf", "Cc", "Co", "Cn", "Cs"}


def normalise(text: str, limit: int = MAX_CHARS) -> str:
    """Return the scorer's view of `text`: folded, undisguised, single-spaced, at most `limit` characters.

    NFKC, casefold, format characters and stacked marks dropped, Cyrillic and Greek look-alikes written in Latin, runs
    of one symbol cut to three, spaced single letters joined ("h a c k", "h/a/c/k" and "h, a, c, k, s" are words),
    words joined by underscores and the like taken apart, digits and signs inside words read as the letters they look
    like ("h4ck" and "h@ck" are "hack", "mp3" and "12kg" stay), whitespace collapsed. Of a text that is still too long
    beginning and end are kept.
    """
    text = text if len(text) <= limit else _shortened(text, limit)
    return _VIEWS[text] if limit == MAX_CHARS else _view(text, limit)


class _Views(dict[str, str]):
    """Views of the last texts: the first tier, the encoder and the check for ciphers all read the same step. Emptied
    when full, which costs less than an order of use."""

    def __missing__(self, text: str) -> str:
        if len(self) >= _VIEWED:
            self.clear()
        found = self[text] = _view(text, MAX_CHARS)
        return found


_VIEWS = _Views()


def _view(text: str, limit: int) -> str:
    if not text.isascii():
        text = _undisguise(text)
        text = text if len(text) <= limit else _shortened(text, limit)
    text = text.lower().replace("`", "'")
    # All patterns together take 20 us for 20 words, the shape 1; in a string `in` is six times as fast as in bytes.
    shape = text.encode().translate(_SHAPE, _INNER).decode()
    if "????" in shape or "    " in shape or "!!!!" in shape:
        text = _REPEATED.sub(r"\1\1\1", text)
    letters = f" {shape.replace('?', ' ')} "
    if letters.count(" a ") > 1 and any(map(letters.__contains__, _SINGLE_LETTERS)):
        text = _LISTED.sub(_join_word, _WIDE.sub(_join, _SPACED.sub(_join, _spread(text))))
    if "a!" in shape and ("!a" in shape or "!0" in shape):
        text = _SIGNED_WORD.sub(_unsign, text)
    if "a0" in shape and "0a" in shape:
        text = text.translate(_LEET_ALL) if _leet(text) else _LEET_WORD.sub(_unleet, text)
    words = text.split()
    if len(text) > _LONG * len(words) and "://" not in text:
        words = _apart(text, len(words)).split()
    return " ".join(words)


def _shortened(text: str, limit: int) -> str:
    """A text of more than `limit` characters: runs of anything collapsed, then its two ends."""
    text = _ends(text, _READ * limit)
    if not text.isascii():
        text = _ends(_undisguise(text), _READ * limit)
    return _ends(_ANY_REPEATED.sub(r"\1\1\1", " ".join(text.split())), limit)


def _ends(text: str, limit: int) -> str:
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]} {text[len(text) - half :]}"


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
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    text = _ends("".join(unicodedata.normalize("NFKC", piece) for piece in pieces), _READ * MAX_CHARS)
    text = text.casefold().translate(_KEPT)
    # After NFKC a mark that composes is part of its letter; what is left was stacked to break the word.
    return _STACKED_MARKS.sub("", text).translate(_TABLE)


def _spread(text: str) -> str:
    """A text of hardly anything but single letters: its wider gaps part words, the narrowest stand inside them."""
    words = text.split()
    gaps = sorted({len(gap) for gap in _GAPS.findall(text.strip())})
    single = sum(len(word) == 1 for word in words)
    # A text whose letters stand one blank apart keeps the view by whose hash `classifiers.corpus` splits requests.
    if len(gaps) < 2 or gaps[0] < 2 or len(words) < _SPREAD or single < _SINGLES * len(words):
        return text
    return " ".join("".join(part.split()) for part in text.split(" " * gaps[1]))


def _join(match: re.Match[str]) -> str:
    return _NO_LETTERS.sub("", match.group())


def _join_word(match: re.Match[str]) -> str:
    """A list, a sum or a column of letters may be anything; joined, few of them read like a word."""
    word = _join(match)
    ordered = list(word) == sorted(word)
    return match.group() if ordered or likelihood([word]).mean < _WORDLIKE else word


def _unsign(match: re.Match[str]) -> str:
    word = match.group()
    before, _, after = word.partition("@")
    # "A@B", "x$y$z" and "root@localhost" are no words.
    plain = not any(len(part) > 1 for part in re.split("[@$!]", word)) or min(len(before), len(after)) > 2
    return word if plain else word.translate(_SIGNS)


def _leet(text: str) -> bool:
    """Whether a whole text is spelled with digits for letters."""
    found = (word.translate(_LEET_MORE) for word in _LEET_WORD.findall(text))
    count: int = sum(word.isalpha() and likelihood([word]).mean >= _WORDLIKE for word in found)
    return count >= max(float(_LEET_WORDS), _LEET_SHARE * len(text.split()))


def _unleet(match: re.Match[str]) -> str:
    word = match.group()
    more = word[0].isalpha() and len(word) <= _LEET_LENGTH and len(_DIGITS.findall(word)) > 1
    return word.translate(_LEET_MORE if more else _LEET)


def _apart(text: str, words: int) -> str:
    """A text whose words hang together by a mark that stands between letters more often than white space does."""
    marks = Counter(_JOINED.findall(text)).most_common(1)
    if not marks or marks[0][1] < max(2, 2 * words):
        return text
    mark = marks[0][0]
    return _JOINED.sub(lambda found: " " if found.group() == mark else found.group(), text)
