"""A step enciphered or encoded in many ways."""

from __future__ import annotations

import base64
import codecs
import random
import unicodedata
from collections.abc import Callable
from string import ascii_lowercase

_MORSE = [
    ".-", "-...", "-.-.", "-..", ".", "..-.", "--.", "....", "..", ".---", "-.-", ".-..", "--", "-.", "---", ".--.",
    "--.-", ".-.", "...", "-", "..-", "...-", ".--", "-..-", "-.--", "--..",
]  # fmt: skip
_BRAILLE = "⠁⠃⠉⠙⠑⠋⠛⠓⠊⠚⠅⠇⠍⠝⠕⠏⠟⠗⠎⠞⠥⠧⠺⠭⠽⠵"


def _alphabet(letters: str) -> Callable[[str], str]:
    table = str.maketrans(ascii_lowercase + ascii_lowercase.upper(), letters + letters.upper())
    return lambda text: _plain(text).translate(table)


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _signs(signs: str) -> Callable[[str], str]:
    return lambda text: _plain(text).lower().translate(str.maketrans(ascii_lowercase, signs))


def _numbers(text: str) -> list[int]:
    return [ord(char) - 96 for char in _plain(text).lower() if char in ascii_lowercase]


def _vigenere(text: str) -> str:
    key, used, found = "lemon", 0, ""
    for char in _plain(text).lower():
        if char in ascii_lowercase:
            char = chr(97 + (ord(char) + ord(key[used % 5]) - 194) % 26)
            used += 1
        found += char
    return found


_SHUFFLED = "".join(random.Random(1).sample(ascii_lowercase, 26))
CIPHERS: dict[str, Callable[[str], str]] = {
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "capitals by seven": lambda text: _alphabet(ascii_lowercase[7:] + ascii_lowercase[:7])(text).upper(),
    "atbash": _alphabet(ascii_lowercase[::-1]),
    "reversed": lambda text: text[::-1],
    "words reversed": lambda text: " ".join(word[::-1] for word in text.split()),
    "random alphabet": _alphabet(_SHUFFLED),
    "vigenere": _vigenere,
    "rot47": lambda text: text.translate({i: 33 + (i + 14) % 94 for i in range(33, 127)}),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base32": lambda text: base64.b32encode(text.encode()).decode(),
    "hex": lambda text: text.encode().hex(),
    "hex in pairs": lambda text: text.encode().hex(" "),
    "hex escapes": lambda text: "".join(f"\\x{byte:02x}" for byte in text.encode()),
    "percent": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "binary": lambda text: " ".join(f"{byte:08b}" for byte in text.encode()),
    "binary in one": lambda text: "".join(f"{byte:08b}" for byte in text.encode()),
    "decimal": lambda text: " ".join(map(str, text.encode())),
    "octal": lambda text: " ".join(f"{byte:03o}" for byte in text.encode()),
    "places in the alphabet": lambda text: "-".join(map(str, _numbers(text))),
    "morse": lambda text: " ".join(_MORSE[number - 1] for number in _numbers(text)),
    "braille": _signs(_BRAILLE),
    "emoji": _signs("".join(chr(0x1F400 + i) for i in range(26))),
    "runes": _signs("".join(chr(0x16A0 + i) for i in range(26))),
    "tags": lambda text: "ok" + "".join(chr(0xE0000 + ord(char)) for char in text),
    "variation selectors": lambda text: "ok" + "".join(chr(0xE0100 + byte) for byte in text.encode()),
    "zero-width bits": lambda text: (
        "ok" + "".join("\u200b\u200c"[int(bit)] for byte in text.encode() for bit in f"{byte:08b}")
    ),
    "single letters": lambda text: " ".join(char for char in _plain(text) if char.isalpha()),
}
"""By name what makes a step unreadable."""
