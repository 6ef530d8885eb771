"""What a prompt's token ids say: the request, and where in the zone grammar generation starts.

Both are read from ids. How a user turn is marked is learned by rendering the tokenizer's own chat template around a
sentinel, so any template works; text that merely spells a marker changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guard.steps import TokenTable
from guard.traces import Trace
from guard.zones import ZoneGrammar, ZoneReader

_SENTINEL = "zqxsentinelxqz"
_MAX_REQUEST_TOKENS = 2048
_MAX_READ_TOKENS = 8192
_ROLE = re.compile(r"\A\s*[A-Za-z_]{2,12}\s*(?:\n|\Z)")


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
    grammar: ZoneGrammar
    opener: tuple[int, ...]
    closer: tuple[int, ...]

    @classmethod
    def build(cls, tokenizer: ChatTokenizer, table: TokenTable, grammar: ZoneGrammar) -> PromptReader:
        """Learns the markers; without a chat template the whole prompt counts as the request."""
        user = {"role": "user", "content": _SENTINEL}
        try:
            text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        except ValueError:
            return cls(table, grammar, (), ())
        before, _, after = text.partition(_SENTINEL)
        try:
            turns = tokenizer.apply_chat_template([user, {**user, "role": "assistant"}], tokenize=False)
        except Exception:  # noqa: BLE001 - a template may refuse any conversation it likes
            turns = ""
        before_ids, after_ids, reply = (
            tokenizer.encode(part, add_special_tokens=False) for part in (before, after, turns.partition(_SENTINEL)[2])
        )
        opener = _opener(before_ids, [after_ids, reply], table)
        first = next((i for i, t in enumerate(after_ids) if t in table.markers), len(after_ids) - 1)
        return cls(table, grammar, opener, _trimmed(after_ids[: first + 1], table))

    def request(self, prompt: Sequence[int]) -> str:
        """The last user message, at most its last 2,048 tokens."""
        ids = list(prompt)
        start = _rfind(ids, self.opener, len(ids))
        begin = start + len(self.opener) if start >= 0 else 0
        end = _find(ids, self.closer, begin)
        body = ids[begin : end if end >= 0 else len(ids)]
        return self.table.text(body[-_MAX_REQUEST_TOKENS:]).strip()

    def messages(self, prompt: Sequence[int]) -> list[str]:
        """Every message of a prompt, the oldest first, whoever says it; of a long prompt the beginning and the end.

        What stands between two markers is one; a role's name before a line break, or alone, is none.
        """
        ids = list(prompt)
        if len(ids) > _MAX_READ_TOKENS:
            ids = [*ids[:_MAX_REQUEST_TOKENS], *ids[_MAX_REQUEST_TOKENS - _MAX_READ_TOKENS :]]
        runs: list[list[int]] = [[]]
        for token in ids:
            if token in self.table.markers:
                runs.append([])
            else:
                runs[-1].append(token)
        texts = [self.table.text(run).strip() for run in runs]
        return [said for text in texts if (said := _ROLE.sub("", text).strip())] or [text for text in texts if text]

    def restored(self, trace: Trace) -> Trace:
        """The trace with its request, which is read from the prompt where `log_content: ids` kept no text."""
        if trace.log_content != "ids":
            return trace
        return trace.model_copy(update={"request": self.request(trace.prompt_ids)})

    def zones(self, prompt: Sequence[int]) -> ZoneReader:
        """A reader that has read the prompt from the last user turn on: generation goes on where it stands."""
        ids, reader = list(prompt), ZoneReader(self.grammar, self.table)
        for token in ids[max(0, _rfind(ids, self.opener, len(ids))) :]:
            reader.feed(token)
        return reader


def _opener(before: list[int], others: list[list[int]], table: TokenTable) -> tuple[int, ...]:
    """The shortest run from a marker up to the user's text that opens no assistant turn as well."""
    starts = [i for i, token in enumerate(before) if token in table.markers] or [0]
    for start in reversed(starts):
        opener = _trimmed(before[start:], table)
        if all(_find(ids, opener, 0) < 0 for ids in others):
            return opener
    return _trimmed(before[starts[0] :], table)


def _trimmed(ids: list[int], table: TokenTable) -> tuple[int, ...]:
    """Without blank tokens at the ends: a message that starts with a line break may share a token with the marker's."""
    solid = [i for i, token in enumerate(ids) if token in table.markers or table.text([token]).strip()]
    return tuple(ids[solid[0] : solid[-1] + 1]) if solid else ()


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
