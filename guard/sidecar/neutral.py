"""Breaks up text that a tokenizer would read as a special token.

Special tokens written by a client could close the user's turn, open the model's, or end its reasoning. A zero-width
joiner after the token's first character leaves the text readable and makes it ordinary text; the result is checked
with the tokenizer itself, which also catches spellings that only its normaliser turns into a special token.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from guard.sidecar.errors import Refused
from guard.zones import MARKS

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

JOINER = "\u200d"
_MARKUP = re.compile(r"<.*>|\[.*\]", re.DOTALL)
_ROUNDS = 32


class Neutraliser:
    """Knows one tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer

        # A copy: a tokenizer file may ask for truncation, and what it cut off would go unchecked.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        # Qwen3 and the DeepSeek distills mark their reasoning with added tokens that are not flagged special.
        marked = {i: t.content for i, t in added.items() if t.special or _marks(t.content)}
        self.ids = frozenset(marked)
        texts = sorted({t for t in marked.values() if len(t) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def found_in(self, text: str) -> bool:
        """Whether a text holds a special token: spelled out, or in the tokenizer's eyes."""
        spelled = self._pattern is not None and self._pattern.search(text) is not None
        return spelled or not self.ids.isdisjoint(self._read(text).ids)

    def clean(self, text: str) -> str:
        """The same text without any special token; Refused when it cannot be broken up. Clean text is unchanged."""
        for joiner in (JOINER, " "):
            result = self._checked(self._spelled(text, joiner), joiner)
            if result is not None:
                return result
        raise Refused("`messages` spell a special token of the model that cannot be neutralised.", param="messages")

    def _read(self, text: str) -> Encoding:
        # A batch lets other threads run meanwhile; `encode` holds them all up, for 1.6 s with a body of 2 MiB.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return encoding

    def _spelled(self, text: str, joiner: str) -> str:
        """Breaks literal spellings; one broken token may hold another, hence the rounds."""
        for _ in range(_ROUNDS):
            if self._pattern is None or not self._pattern.search(text):
                break
            text = self._pattern.sub(lambda match: match[0][0] + joiner + match[0][1:], text)
        return text

    def _checked(self, text: str, joiner: str) -> str | None:
        """Breaks what the tokenizer still reads as special; None when that does not help."""
        for _ in range(_ROUNDS):
            encoding = self._read(text)
            cuts = {span[0] + 1 for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self.ids}
            if not cuts:
                return text
            text = joiner.join(text[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(text)]))
        return None


def _marks(token: str) -> bool:
    return token in MARKS or _MARKUP.fullmatch(token) is not None
