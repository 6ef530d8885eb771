"""A long text in windows that the encoder reads whole: what is asked may stand anywhere in a prompt.

A mean over all tokens forgets a sentence among many others, and a text that is cut has a middle that nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

MOST = 16
"""Windows of one prompt that are read: some 500 tokens, 13 ms each."""
_FIRST = 4
"""Of these from its beginning: the rest are its end, where questions stand."""
MOST_CHARS = 32_000
_HEAD_CHARS = 8_000
_BREAK = re.compile(r"(?<=[.!?;:…])\s+|(?<=[。！？；])|\n+")
Ids = list[int]
T = TypeVar("T")


def sentences(text: str) -> Iterator[str]:
    """The sentences and lines of a text; of one that is longer than 32,000 characters the beginning and the end."""
    if len(text) > MOST_CHARS:
        text = f"{text[:_HEAD_CHARS]}\n{text[_HEAD_CHARS - MOST_CHARS :]}"
    return (part for part in map(str.strip, _BREAK.split(text)) if part)


def windows(units: Sequence[Ids], span: int) -> list[Ids]:
    """Runs of whole units (ids of a sentence each), at most `span` ids long; each begins about half a window after the
    one before, so that what is shorter than half of one stands whole in some window, with little around it."""
    short = [unit[at : at + span // 2] for unit in units for at in range(0, len(unit), span // 2)]
    found: list[Ids] = []
    start = 0
    while start < len(short):
        stop = size = 0
        for stop in range(start, len(short)):
            if size and size + len(short[stop]) > span:
                break
            size += len(short[stop])
        else:
            found.append([i for unit in short[start:] for i in unit])
            return found
        found.append([i for unit in short[start:stop] for i in unit])
        passed, start = len(short[start]), start + 1
        while start < stop and (passed + len(short[start])) * 2 <= size:
            passed, start = passed + len(short[start]), start + 1
    return found


def within(found: Sequence[T], most: int) -> list[T]:
    """At most `most` windows: the first few and the last."""
    if len(found) <= most:
        return list(found)
    first = min(_FIRST, most // 2)
    return [*found[:first], *found[len(found) - (most - first) :]]


def units_of(text: str, encode: Callable[[str], Ids]) -> list[Ids]:
    """The ids of each sentence of a text; `encode` adds no special ids."""
    return [ids for part in sentences(text) if (ids := encode(part))]
