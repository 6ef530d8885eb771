"""Token ids -> the fields of a chat response: reasoning and content, told apart as the guard tells them apart."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

from guard.steps import TokenTable, Zone
from guard.zones import ZoneReader

Field = Literal["reasoning", "content"]
_FIELD: dict[Zone, Field] = {"reasoning": "reasoning", "answer": "content"}


class Speech:
    """Turns one output's ids into text as they come; a character whose bytes are not all there waits for them."""

    def __init__(self, table: TokenTable, zones: ZoneReader) -> None:
        """`zones` has read the prompt; from here on it is the speech's own."""
        self._table, self._zones = table, zones
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def say(self, ids: Iterable[int], *, last: bool = False) -> list[tuple[Field, str]]:
        """What these ids add, field by field; `last`: nothing comes after them."""
        said = [part for token in ids for part in self._token(token)]
        if last:
            said.append(self._rest())
        joined = [(field, "".join(text for _, text in run)) for field, run in groupby(said, key=lambda part: part[0])]
        return [part for part in joined if part[1]]

    def _token(self, token: int) -> list[tuple[Field, str]]:
        rest = self._rest() if token in self._zones.grammar.marks else None
        if self._zones.feed(token):
            return [rest] if rest is not None else []
        piece = self._table.bytes_of[token] if 0 <= token < len(self._table.bytes_of) else b""
        said = (_FIELD[self._zones.zone], self._decoder.decode(piece))
        return [said] if rest is None else [rest, said]

    def _rest(self) -> tuple[Field, str]:
        """What is left of a character whose other bytes will not come."""
        rest = (_FIELD[self._zones.zone], self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return rest
