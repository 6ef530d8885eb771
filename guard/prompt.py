"""What a prompt's token ids say: the request, and the zone in which generation starts.

Both are read from ids. How a user turn is marked is learned by rendering the tokenizer's own chat template around a
sentinel, so any template works; text that merely spells a marker changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guard.steps import Delimiters, TokenTable, Zone

_SENTINEL = "zqxsentinelxqz"
_MAX_REQUEST_TOKENS = 2048


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Renders messages to text."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class PromptReader:
    """Finds the last user message between the ids that open and close a user turn."""

    table: TokenTable
    delimiters: Delimiters
    opener: tuple[int, ...]
    closer: tuple[int, ...]

    @classmethod
    def build(cls, tokenizer: ChatTokenizer, table: TokenTable, delimiters: Delimiters) -> PromptReader:
        """Learns the markers; without a chat template the whole prompt counts as the request."""
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True
            )
        except ValueError:
            return cls(table, delimiters, (), ())
        before, _, after = text.partition(_SENTINEL)
        is_special = {i for i, piece in enumerate(table.bytes_of) if not piece}
        before_ids = tokenizer.encode(before, add_special_tokens=False)
        after_ids = tokenizer.encode(after, add_special_tokens=False)
        last = max((i for i, t in enumerate(before_ids) if t in is_special), default=0)
        first = next((i for i, t in enumerate(after_ids) if t in is_special), len(after_ids) - 1)
        return cls(table, delimiters, tuple(before_ids[last:]), tuple(after_ids[: first + 1]))

    def request(self, prompt: Sequence[int]) -> str:
        """The last user message, at most its last 2,048 tokens."""
        ids = list(prompt)
        start = _rfind(ids, self.opener, len(ids))
        begin = start + len(self.opener) if start >= 0 else 0
        end = _find(ids, self.closer, begin)
        body = ids[begin : end if end >= 0 else len(ids)]
        return self.table.text(body[-_MAX_REQUEST_TOKENS:]).strip()

    def zone(self, prompt: Sequence[int]) -> Zone:
        """`reasoning` when the prompt ends inside an open reasoning block after the last user turn, else `answer`.

        Generation that starts in the answer zone enters the reasoning zone when the model generates the delimiter.
        """
        tail = list(prompt)[max(0, _rfind(list(prompt), self.opener, len(prompt))) :]
        for token in reversed(tail):
            if token == self.delimiters.end:
                return "answer"
            if token == self.delimiters.start:
                return "reasoning"
        return "answer"


def _rfind(ids: list[int], marker: tuple[int, ...], stop: int) -> int:
    if not marker:
        return -1
    for i in range(stop - len(marker), -1, -1):
        if ids[i] == marker[0] and tuple(ids[i : i + len(marker)]) == marker:
            return i
    return -1


def _find(ids: list[int], marker: tuple[int, ...], start: int) -> int:
    if not marker:
        return -1
    for i in range(start, len(ids) - len(marker) + 1):
        if ids[i] == marker[0] and tuple(ids[i : i + len(marker)]) == marker:
            return i
    return -1
