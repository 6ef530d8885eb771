"""Output token ids -> reasoning and answer texts, told apart by the delimiters' ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guard.steps import TokenTable
from guard.zones import ZoneGrammar


@dataclass(frozen=True)
class Reply:
    """One finished output. `closed`: the reasoning was ended by its delimiter."""

    reasoning: str
    answer: str
    closed: bool


def opened(output: Sequence[int], table: TokenTable, grammar: ZoneGrammar) -> int:
    """Index at which an output's reasoning begins: 0, or behind the mark with which the model opens it by itself."""
    start = grammar.paths.get(("answer", "reasoning"), ())
    for index, token in enumerate(output):
        if (token,) == start:
            return index + 1
        if table.text([token]).strip():
            return 0
    return 0


@dataclass(frozen=True)
class ReplyReader:
    """Reads outputs of one tokenizer that begin with their reasoning, its mark included where no prompt has it."""

    table: TokenTable
    grammar: ZoneGrammar

    def read(self, output: list[int]) -> Reply:
        """Splits at the first end delimiter; special tokens leave no text."""
        end, start = self.grammar.end, opened(output, self.table, self.grammar)
        if end is None or end not in output:
            return Reply(self.table.text(output[start:]).strip(), "", closed=False)
        at = output.index(end)
        return Reply(self.table.text(output[start:at]).strip(), self.table.text(output[at + 1 :]).strip(), closed=True)
