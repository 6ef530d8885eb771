"""Token ids -> the fields of a chat response: reasoning and content, told apart by the delimiters' ids."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

from guard.steps import Delimiters, TokenTable, Zone

Field = Literal["reasoning", "content"]
_FIELD: dict[Zone, Field] = {"reasoning": "reasoning", "answer": "content"}


class Speech:
    """Turns one output's ids into text as they come; a character whose bytes are not all there waits for them."""

    def __init__(self, table: TokenTable, delimiters: Delimiters, zone: Zone) -> None:
        self._table, self._delimiters, self._zone = table, delimiters, zone
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def say(self, ids: Iterable[int], *, last: bool = False) -> list[tuple[Field, str]]:
        """What these ids add, field by field; `last`: nothing comes after them."""
        said = [part for token in ids for part in self._token(token)]
        if last:
            said.append((_FIELD[self._zone], self._decoder.decode(b"", final=True)))
        joined = [(field, "".join(text for _, text in run)) for field, run in groupby(said, key=lambda part: part[0])]
        return [part for part in joined if part[1]]

    def _token(self, token: int) -> list[tuple[Field, str]]:
        if token not in (self._delimiters.start, self._delimiters.end):
            piece = self._table.bytes_of[token] if 0 <= token < len(self._table.bytes_of) else b""
            return [(_FIELD[self._zone], self._decoder.decode(piece))]
        rest = (_FIELD[self._zone], self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._zone = "answer" if token == self._delimiters.end else "reasoning"
        return [rest]
