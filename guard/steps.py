"""Token ids -> steps: pure, incremental, without decoding a quiet token.

A step is one sentence-like unit. A token costs one table look-up (can it end a step?) and one append to a byte
buffer; text is decoded only where a step may end. Which zone a step stands in, `guard.zones` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Zone = Literal["reasoning", "answer"]

#: Latin, Greek, Chinese and Japanese, Indic, Arabic and Urdu, Ethiopic, Khmer, Burmese, Armenian, Tibetan.
_STOPS = ".!?…‼⁇⁈⁉\u037e。！？．｡।॥؟۔።፧፨។៕။։།"
_SEMICOLONS = ";；؛"
_LINE_ENDS = f"{_STOPS}:："
_ENDS = f"{_STOPS}{_SEMICOLONS}\n"
_CLOSERS = "\"'”’)]}*_`»」』"
# "no" is left out: "The answer is no." ends a step more often than "No. 5" begins one.
_ABBREVIATIONS = frozenset(
    "e.g i.e etc mr mrs ms dr prof st vs cf fig eq approx dept inc ltd jr sr u.s u.k z.b d.h bzw vgl".split()  # noqa: SIM905 - a list would be one word a line
)
#: Letters and digits from which a single line break ends a step whatever stands before it: a few words a line would
#: otherwise cut a cue into fragments that say nothing.
_LINE = 40
#: The same for a semicolon: of 36,839 steps of public traces 16 are split by it, and no chain runs to the token limit.
_CHAIN = 60
_ITEM = re.compile(r"\s*(?:[-*+•–>]|#{1,6}|(?:\d{1,3}|[A-Za-z])[.)])\s|\s*\|")
_LAST_WORD = re.compile(r"([^\W_](?:[\w.]*\w)?)\.$")
_WORD = 24
"""Characters at a step's end that its last word is looked for in."""
#: Bytes of a cut step that the next one is read with, so that a cue across the cut stands whole in one of them.
_OVERLAP = 96
_INNER = bytes(range(0x80, 0xC0))
_NO_WORD = bytes(i for i in range(256) if not (i < 128 and chr(i).isalnum()))
#: Pieces that a tokenizer would keep whole; only `split_text` uses them.
_PIECE = re.compile(r"[^\S\n]*\w+|[^\w\s]+|\s+")


@dataclass(frozen=True)
class StepLimits:
    """When a step is too short to stand alone or too long to wait for.

    `min_chars` counts letters and digits; `max_tokens` forces a cut so that text without an end is still scored.
    """

    min_chars: int = 12
    max_tokens: int = 96


class Step(NamedTuple):
    """One finished step: output token indices (half open) and its text without surrounding white space.

    A step after one that was cut has the end of that one before its own text. A tuple is made in a third of the time
    that a frozen dataclass takes.
    """

    start: int
    end: int
    text: str
    zone: Zone = "reasoning"
    cut: bool = False
    """Cut at the token limit, without an end mark."""
    spaced: bool = False
    """Its last token ended with white space."""


class TokenTable:
    """Per token id: its bytes, and whether a step can end with it. Built once per tokenizer (0.1 to 0.5 s)."""

    def __init__(self, pieces: list[bytes], markers: frozenset[int] = frozenset()) -> None:
        self.bytes_of = pieces
        self.markers = markers
        """Added tokens with visible text: what templates mark turns with, whether flagged special or not."""
        ends = [c.encode() for c in _ENDS]
        # A tokenizer may split one character over several tokens; then the token with its last bytes ends the step.
        tails = tuple(e[i:] for e in ends for i in range(1, len(e)))
        held = re.compile(b"|".join(map(re.escape, ends))).search
        self.can_end = bytearray(held(piece) is not None or piece.startswith(tails) for piece in pieces)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> TokenTable:
        """Reads the vocabulary; special tokens contribute no bytes, so that text can never forge one."""
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = {int(i): t for i, t in tokenizer.get_added_tokens_decoder().items()}
        byte_level = _uses_byte_level(tokenizer)
        size = max([size, *(i + 1 for i in added)])
        pieces: list[bytes] = []
        for i in range(size):
            if i in added:
                pieces.append(b"" if added[i].special else added[i].content.encode())
                continue
            token = tokenizer.id_to_token(i)
            pieces.append(b"" if token is None else _token_bytes(token, byte_level))
        return cls(pieces, frozenset(i for i, token in added.items() if token.content.strip()))

    def text(self, ids: list[int]) -> str:
        """Text of a run of ids; bytes that are no UTF-8 become U+FFFD, ids outside the table nothing."""
        size = len(self.bytes_of)
        return b"".join(self.bytes_of[i] for i in ids if 0 <= i < size).decode("utf-8", "replace")


class StepSplitter:
    """Groups one request's tokens into steps: `push` each id, `flush` at the end of a zone."""

    def __init__(self, table: TokenTable, limits: StepLimits) -> None:
        self._pieces, self._can_end, self._size = table.bytes_of, table.can_end, len(table.bytes_of)
        self._limits, self._most = limits, limits.max_tokens
        self._buffer = bytearray()
        self._carry = b""
        self._start = 0
        self.zone: Zone = "reasoning"
        """Of the step under way."""
        self.count = 0
        """Its tokens."""

    def push(self, token: int, index: int) -> Step | None:
        """Takes the token at output index `index`; returns the step that it finished, if any."""
        count = self.count = self.count + 1
        if count == 1:
            self._start = index
        may_end = 0
        if 0 <= token < self._size:
            self._buffer += self._pieces[token]
            may_end = self._can_end[token]
        if count >= self._most:
            return self._take(cut=True)
        if may_end and ends_step(self._buffer.decode("utf-8", "ignore"), self._limits.min_chars):
            return self._take(cut=False)
        return None

    @property
    def room(self) -> int:
        """How many more ids fit into the step before one has to be pushed by itself: it may be the last."""
        return self._most - self.count - 1

    def extend(self, tokens: Sequence[int], index: int) -> None:
        """Takes up to `room` ids that can end no step, the first at output index `index`."""
        if not self.count:
            self._start = index
        self.count += len(tokens)
        pieces = self._pieces
        self._buffer += b"".join([pieces[token] for token in tokens])

    def hold(self, token: int, index: int) -> None:
        """Takes a token that may turn out to be no text (`drop`): it ends no step by itself."""
        if not self.count:
            self._start = index
        self.count += 1
        if 0 <= token < self._size:
            self._buffer += self._pieces[token]

    def drop(self) -> None:
        """What was taken since the last step was no text."""
        self._carry = b""
        self._reset()

    def flush(self) -> Step | None:
        """The unfinished step, if it holds any text."""
        if self.count and self._buffer.strip():
            return self._take(cut=False)
        self.drop()
        return None

    def forget(self) -> None:
        """What was cut has been dealt with: the next step is read by itself."""
        self._carry = b""

    def _take(self, *, cut: bool) -> Step:
        text = (self._carry + self._buffer).decode("utf-8", "replace")
        step = Step(self._start, self._start + self.count, text.strip(), self.zone, cut, text[-1:].isspace())
        self._carry = _tail(bytes(self._buffer)) if cut else b""
        self._reset()
        return step

    def _reset(self) -> None:
        self._buffer.clear()
        self.count = 0


def _tail(text: bytes) -> bytes:
    """The last words of a step that was cut."""
    end = text[-_OVERLAP:]
    # Never begins inside a character; it may end inside one, whose other bytes the next step brings.
    return end[end.find(b" ") + 1 :].lstrip(_INNER)


def ends_step(text: str, min_chars: int) -> bool:
    """Whether text that was just extended by an end mark is a whole step.

    A full stop after a digit ("3." of "3.14" or of a list) or an abbreviation is no end unless white space follows. A
    blank line always is one; a single line break after an end mark, a colon, an item of a list or a long enough step.
    """
    if not _enough(text, min_chars):
        return False
    body = text.rstrip()
    core = body.rstrip(_CLOSERS)
    breaks = text.count("\n", len(body))
    if breaks > 1:
        return True
    if not core:
        return False
    if breaks:
        return _ends_line(core, body)
    if core[-1] not in _STOPS:
        return core[-1] in _SEMICOLONS and _enough(text, _CHAIN)
    if core[-1] != ".":
        return True
    before = core[-2:-1]
    if before.isdigit():
        return len(body) < len(text)
    word = _last_word(core[-_WORD:])
    return not (len(word) == 1 or word.lower() in _ABBREVIATIONS)


def _last_word(end: str) -> str:
    """The word before the full stop that `end` ends with; empty where there is none."""
    pieces = end[:-1].split()
    # Most are plain: a third of the time that the pattern takes, which is tried at every character.
    if pieces and pieces[-1].isalpha() and not end[-2].isspace():
        return pieces[-1]
    found = _LAST_WORD.search(end)
    return found.group(1) if found else ""


def _ends_line(core: str, body: str) -> bool:
    """Whether a single line break after `body` ends a step; `core` is `body` without closing quotes and brackets."""
    line = body[body.rfind("\n") + 1 :]
    return core[-1] in _LINE_ENDS or _ITEM.match(line) is not None or _enough(body, _LINE)


def split_text(text: str, limits: StepLimits | None = None) -> list[str]:
    """The steps of a whole text, by the live splitter's rules, for text that comes without token ids."""
    limits = limits or StepLimits()
    return list(_split(text, limits))


def _split(text: str, limits: StepLimits) -> Iterator[str]:
    start = count = 0
    carry = ""
    for piece in _PIECE.finditer(text):
        count += 1
        here = text[start : piece.end()]
        cut = count >= limits.max_tokens
        if cut or (any(c in _ENDS for c in piece.group()) and ends_step(here, limits.min_chars)):
            if here.strip():
                yield (carry + here).strip()
            start, count = piece.end(), 0
            carry = _tail(here.encode("utf-8", "replace")).decode() if cut else ""
    if text[start:].strip():
        yield (carry + text[start:]).strip()


def _enough(text: str, min_chars: int) -> bool:
    # Most steps are plain: 1.7 times as fast as the loop.
    if text.isascii() and len(text.encode().translate(None, _NO_WORD)) >= min_chars:
        return True
    count = 0
    for char in text:
        if char.isalnum():
            # An ideograph carries about as much as a short word.
            count += 3 if char > "\u2e7f" else 1
            if count >= min_chars:
                return True
    return False


def _uses_byte_level(tokenizer: Tokenizer) -> bool:
    spec = json.loads(tokenizer.to_str())
    return '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])


def _token_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:
        return (
            bytes(_UNICODE_TO_BYTE[c] for c in token) if all(c in _UNICODE_TO_BYTE for c in token) else token.encode()
        )
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (github.com/openai/gpt-2, src/encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_UNICODE_TO_BYTE = _byte_alphabet()
