"""The seam of a pair: ids of a prefix, forced triggers and sampled continuations put together must be one output.

Everything is joined as ids, never as text that is encoded again. What can still go wrong is checked here: a seam inside
a character, a second BOS, an EOS that no model produced (PAPER 5.1: effects of the seam are otherwise taken for effects
of the loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guard.steps import TokenTable

#: Why a pair with a bad seam is dropped.
SPLIT, TWO_BOS, FALSE_EOS = "seam inside a character", "second BOS", "EOS that was not generated"


@dataclass(frozen=True)
class Side:
    """One side of a pair in the pieces it was made of, in order; `finish`: why its generation ended.

    `finish` is vLLM's (`stop`: the last id is an EOS; `length`: cut off), or None where nobody recorded it.
    """

    pieces: tuple[Sequence[int], ...]
    finish: str | None

    @property
    def ids(self) -> list[int]:
        """The side as one run of ids."""
        return [token for piece in self.pieces for token in piece]


@dataclass(frozen=True)
class SeamCheck:
    """What a seam is checked against: the tokenizer's bytes, BOS and EOS (None where it has none)."""

    table: TokenTable
    bos: int | None
    eos: int | None

    def objection(self, prompt: Sequence[int], prefix: Sequence[int], side: Side) -> str | None:
        """Why the side cannot follow `prompt + prefix`, or None."""
        output = [*prefix, *side.ids]
        whole = self.table.text(output)
        if whole != "".join(self.table.text(list(piece)) for piece in (prefix, *side.pieces)):
            return SPLIT
        if self.bos is not None and (list(prompt[:2]) == [self.bos, self.bos] or self.bos in output):
            return TWO_BOS
        ended = output[-1:] == [self.eos]
        if self.eos is not None and (self.eos in output[:-1] or (ended and side.finish == "length")):
            return FALSE_EOS
        return None
