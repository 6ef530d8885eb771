"""Encoded writing: base64, hex, numbers, Morse, signs that stand for letters, characters that do not show.

A step is called encoded only if most of it is a code and the code holds writing: a key, a digest, a table of numbers
and a picture hold none. All numbers are chosen by measurement (`docs/design/0005`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator

from classifiers.letters import likelihood

_MOST = 4000
"""Characters that are read."""
_FEWEST = 16
"""Characters of a code, letters of what it holds; fewer say too little."""
_WRITTEN, _SPACED = 0.9, 12
"""Share of letters, blanks and common marks in writing; most letters a blank, where words are parted by blanks."""
_READS, _READS_PLAINLY = -3.3, -2.9
"""Mean log probability of a letter pair, in nats, of letters without blanks between words, and with them."""
_SIGNS, _KINDS, _REPEATS = 24, 8, 1.5
"""Signs, kinds of them, and how often one comes, from which they stand for letters: a rating has fewer kinds, a list
of fruits no repeats."""
_HIDDEN_RUN, _HIDDEN, _HIDDEN_SHARE = 8, 24, 1.25
"""Invisible characters in a row, as no emoji or flag has them; altogether; to a visible one."""

_BASE = re.compile(r"(?:[A-Za-z0-9+/_-]{16,}=*\s*)+")
_HEX = re.compile(r"(?:(?:0x|\\x|%|\\u00|U\+00|&#x)?[0-9A-Fa-f]{2}[\s,;:]*){12,}")
_HEX_MARKS = re.compile(r"0x|\\x|\\u00|U\+00|&#x|[%\s,;:]")
_BITS = re.compile(r"(?:[01]{7,8}[\s,]+){7,}[01]{7,8}|[01]{56,}")
_NUMBERS = re.compile(r"(?:(?:&#|\\)?[0-9]{1,3}[;\s,/.|-]{1,3}){11,}[0-9]{1,3}")
_MORSE = re.compile(r"(?:[.·•−–—_-]{1,6}[\s/|]+){15,}[.·•−–—_-]{1,6}")
_DASHES = str.maketrans("·•−–—_", "..----")
_MORSE_LETTERS = {
    ".-": "a", "-...": "b", "-.-.": "c", "-..": "d", ".": "e", "..-.": "f", "--.": "g", "....": "h", "..": "i",
    ".---": "j", "-.-": "k", ".-..": "l", "--": "m", "-.": "n", "---": "o", ".--.": "p", "--.-": "q", ".-.": "r",
    "...": "s", "-": "t", "..-": "u", "...-": "v", ".--": "w", "-..-": "x", "-.--": "y", "--..": "z",
}  # fmt: skip
_NO_DIGITS = bytes(i for i in range(256) if not 48 <= i < 58)
_NO_CONTROLS = bytes(i for i in range(256) if i >= 32 or chr(i).isspace())
_ROT47 = str.maketrans({33 + i: 33 + (i + 47) % 94 for i in range(94)})
# Runes and other dead alphabets, symbols without chess pieces, Braille, emoji; no lines, blocks, arrows, mathematics.
_SIGN = re.compile(
    "[\u1680-\u16ff\u2600-\u2653\u2660-\u27bf\u2801-\u28ff"
    "\U00010000-\U00010fff\U00012000-\U000143ff\U0001f000-\U0001faff]"
)
_INVISIBLE = re.compile(
    "[\u00ad\u115f\u1160\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U000e0000-\U000e01ef]+"
)


def is_encoded(text: str) -> bool:
    """Whether most of a text is a code that holds writing; about 10 us where there is none."""
    text = text[:_MOST]
    visible = len("".join(text.split()))
    if visible < _FEWEST:
        return False
    for pattern, holds_writing in _candidates(text, visible):
        run = max(pattern.findall(text), key=len, default="")
        if 2 * len("".join(run.split())) >= visible and holds_writing(run):
            return True
    return _is_rotated(text) if text.isascii() else _is_signs(text, visible)


def _candidates(text: str, visible: int) -> Iterator[tuple[re.Pattern[str], Callable[[str], bool]]]:
    """Codes that a text may hold; to look for all of them takes three times as long."""
    yield _BASE, _from_base
    if 4 * len(text.encode("utf-8", "replace").translate(None, _NO_DIGITS)) >= visible:
        yield _HEX, _from_hex
        yield _BITS, _from_bits
        yield _NUMBERS, _from_numbers
    if 3 * sum(map(text.count, ".-·•−–—_")) >= visible:
        yield _MORSE, _from_morse


def hides_characters(text: str) -> bool:
    """Whether so many characters do not show that they may hold a text themselves."""
    runs = [len(run) for run in _INVISIBLE.findall(text[:_MOST])]
    hidden = sum(runs)
    return hidden >= _HIDDEN and (
        sum(run for run in runs if run >= _HIDDEN_RUN) >= _HIDDEN
        or hidden > _HIDDEN_SHARE * (min(len(text), _MOST) - hidden)
    )


def _is_signs(text: str, visible: int) -> bool:
    signs = _SIGN.findall(text)
    kinds = len(set(signs))
    return len(signs) >= max(_SIGNS, visible / 2, kinds * _REPEATS) and kinds >= _KINDS


def _is_rotated(text: str) -> bool:
    """ROT47, which makes writing look like noise."""
    rotated = text.translate(_ROT47)
    if not _is_writing(rotated):
        return False
    found = likelihood(rotated.lower().split())
    return found.letters >= _FEWEST and found.mean >= _READS_PLAINLY


def _from_base(run: str) -> bool:
    """base64 of both alphabets and base32; a step may begin inside a group."""
    data = "".join(run.split()).replace("=", "").replace("-", "+").replace("_", "/").encode()
    for size, decode in ((4, base64.b64decode), (8, base64.b32decode)):
        for start in range(size):
            try:
                found = decode(data[start : start + (len(data) - start) // size * size])
            except binascii.Error:
                break
            if _holds_writing(found):
                return True
    return False


def _from_hex(run: str) -> bool:
    digits = _HEX_MARKS.sub("", run)
    return any(_holds_writing(bytes.fromhex(half[: len(half) // 2 * 2])) for half in (digits, digits[1:]))


def _from_bits(run: str) -> bool:
    groups = re.split(r"[\s,]+", run)
    if len(groups) > 1:
        return _holds_writing(bytes(int(group, 2) for group in groups))
    return any(
        _holds_writing(bytes(int(run[at : at + size], 2) for at in range(start, len(run) - size + 1, size)))
        for size in (7, 8)
        for start in range(size)
    )


def _from_numbers(run: str) -> bool:
    """Codes of characters, decimal or octal, or places in the alphabet."""
    numbers = re.findall("[0-9]+", run)
    values = [int(number) for number in numbers]
    if max(values) <= 26:
        return _reads("".join(chr(96 + value) for value in values if value))
    if max(values) <= 255 and _holds_writing(bytes(values)):
        return True
    octal = all(len(number) == 3 and number < "400" and "8" not in number and "9" not in number for number in numbers)
    return octal and _holds_writing(bytes(int(number, 8) for number in numbers))


def _from_morse(run: str) -> bool:
    signs = re.split(r"[\s/|]+", run.translate(_DASHES))
    letters = "".join(_MORSE_LETTERS.get(sign, "") for sign in signs)
    return len(letters) >= _WRITTEN * len(signs) and _reads(letters)


def _reads(letters: str) -> bool:
    return len(letters) >= _FEWEST and likelihood([letters]).mean >= _READS


def _holds_writing(data: bytes) -> bool:
    """Whether bytes are writing, or a code that is."""
    if len(data.translate(None, _NO_CONTROLS)) > (1 - _WRITTEN) / 2 * len(data):
        return False
    text = data.decode("utf-8", "replace")
    return _is_writing(text) or (text.isascii() and is_encoded(text))


def _is_writing(text: str) -> bool:
    """Whether letters, blanks and common marks make up a text as they do in sentences."""
    text = " ".join(text.split())
    letters, blanks = sum(map(str.isalpha, text)), text.count(" ")
    marks = sum(map(text.count, ".,;:!?'\"()-’。，、"))
    if letters < _FEWEST // 2 or letters + blanks + marks < _WRITTEN * len(text):
        return False
    # Chinese and Japanese need no blanks.
    return blanks * _SPACED >= letters or 2 * sum(char > "\u2e7f" for char in text) >= letters
