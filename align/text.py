"""Output token ids -> reasoning and answer texts, told apart by the delimiters' ids."""

from __future__ import annotations

from dataclasses import dataclass

from guard.steps import TokenTable
from guard.zones import ZoneGrammar


@dataclass(frozen=True)
class Reply:
    """One finished output. `closed`: the reasoning was ended by its delimiter."""

    reasoning: str
    answer: str
    closed: bool


@dataclass(frozen=True)
class ReplyReader:
    """Reads outputs of one tokenizer whose generation starts inside the reasoning zone."""

    table: TokenTable
    grammar: ZoneGrammar

    def read(self, output: list[int]) -> Reply:
        """Splits at the first end delimiter; special tokens leave no text."""
        end = self.grammar.end
        if end is None or end not in output:
            return Reply(self.table.text(output).strip(), "", closed=False)
        at = output.index(end)
        return Reply(self.table.text(output[:at]).strip(), self.table.text(output[at + 1 :]).strip(), closed=True)
