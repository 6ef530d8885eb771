"""Requests as chats and attackers wrap them: among sentences about other things, or as a turn that asks for nothing.

Most written requests stand alone, and a detector that learned from these alone can be told where not to look.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from classifiers.data import LabelledRequest
from classifiers.labels import LabelledTrace

SMALL_TALK = Path(__file__).parent / "banks" / "small_talk.txt"
DILUTED, EMPTY = 0.35, 0.1
"""Share of a trace's showings under a diluted request; of an ordinary benign one's under small talk."""
_AROUND = ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2))
"""Harmless requests before and after: what fits into the encoder's window with most requests."""
_LEAST, _MOST = 30, 130
"""Characters of a harmless request that is put beside another."""


@cache
def small_talk() -> tuple[str, ...]:
    """Turns and system prompts that ask for nothing by themselves."""
    return tuple(filter(None, SMALL_TALK.read_text(encoding="utf-8").split("\n")))


def small_talk_requests() -> list[LabelledRequest]:
    """Small talk as harmless requests."""
    return [LabelledRequest(request=said, label="benign", source="small_talk", licence="Apache-2.0")
            for said in small_talk()]  # fmt: skip


class Wrapper:
    """Wraps requests in what else is asked in `traces`: in ordinary English requests of theirs."""

    def __init__(self, traces: Sequence[LabelledTrace]) -> None:
        found = {t.request for t in traces if t.kind == "benign" and t.language == "en" and t.source not in _TERSE}
        self._around = sorted(text for text in found if _LEAST <= len(text) <= _MOST)

    def diluted(self, request: str, rng: random.Random) -> str:
        """A request among others that are harmless."""
        before, after = rng.choice(_AROUND)
        if len(self._around) < before + after:
            return request
        drawn = rng.sample(self._around, before + after)
        return " ".join([*drawn[:before], request, *drawn[before:]])

    def asked(self, row: LabelledRequest, rng: random.Random) -> str:
        """A labelled request as one showing has it."""
        return self.diluted(row.request, rng) if rng.random() < DILUTED else row.request

    def shown(self, trace: LabelledTrace, rng: random.Random) -> LabelledTrace:
        """A trace as one showing of it to the network has it: mostly as it is."""
        drawn = rng.random()
        if drawn < DILUTED:
            return replace(trace, request=self.diluted(trace.request, rng))
        if trace.kind == "benign" and drawn < DILUTED + EMPTY:
            return replace(trace, request=rng.choice(small_talk()))
        return trace


_TERSE = frozenset({"demo"})
"""Their requests are made of a few patterns."""
