"""Hashed features: a text becomes a list of int ids, and nothing else reaches the model.

Ids keep strings out of the ONNX graph, where a string tokenizer is slower and differs from the trainer's. The hash is
zlib.crc32, chained over the parts of a feature, so it is the same in every process and on every machine. Id 0 is
padding and belongs to no feature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import sqrt
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field

from classifiers.normalise import normalise

SCHEME = 3
PADDING = 0
CJK = "\u3040-\u30ff\u3400-\u9fff"
Weighted = tuple[list[int], list[float]]
"""Ids in ascending order and the weight of each."""
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:'[^\W_{CJK}]+)*|[?!]")


class FeatureConfig(BaseModel):
    """What turns a text into ids; part of an artifact's manifest, so that training and runtime cannot differ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: int = SCHEME
    """Version of the feature code; an artifact of another scheme is refused."""
    table_size: int = Field(default=2**18, ge=2, le=2**22)
    """Number of ids, padding included."""
    max_words: int = Field(default=128, ge=1)
    """Words read of one step."""
    max_request_chars: int = Field(default=4000, ge=1)
    """Characters read of a request."""
    max_request_words: int = Field(default=400, ge=1)
    risk_edges: tuple[float, ...] = (0.2, 0.35, 0.5, 0.7)
    """Where the request's risk is cut into buckets."""


REQUEST_FEATURES = FeatureConfig(table_size=2**14)
"""Of what ranks the windows of a long prompt."""


def words_of(text: str, limit: int) -> list[str]:
    """Split a normalised text into at most `limit` words; a Chinese or Japanese character is a word of its own."""
    return _WORD.findall(text)[:limit]


def risk_bucket(risk: float, config: FeatureConfig) -> int:
    """Return which bucket of the request's risk a step is crossed with, from 0 (harmless) upwards."""
    return sum(risk >= edge for edge in config.risk_edges)


def _seed(name: str) -> int:
    return crc32(name.encode() + b"\x00")


_UNI, _BI, _SKIP, _START = _seed("step.uni"), _seed("step.bi"), _seed("step.skip"), _seed("step.start")
_GAP = b" "
_OPENING = 3


def step_ids(step: str, config: FeatureConfig, view: Callable[[str], str] = normalise) -> list[int]:
    """Return the distinct ids of one step, of which the scorer sees `view(step)`; [] for a step without words.

    Words, pairs of neighbours, pairs with one word between, and the opening three words. About 20 us for 20 words.
    """
    words = words_of(view(step), config.max_words)
    before, last = b"^", b"^"
    hashes: set[int] = set()
    opening = _START
    for index, word in enumerate(words):
        code = word.encode() + _GAP
        hashes.update((crc32(code, _UNI), crc32(last + code, _BI), crc32(before + code, _SKIP)))
        if index < _OPENING:
            opening = crc32(code, opening)
            hashes.add(opening)
        before, last = last, code
    return to_ids(hashes, config.table_size)


class Bag:
    """Collects hashed features with weights; a feature named twice keeps its largest weight."""

    def __init__(self, table_size: int) -> None:
        self._span = table_size - 1
        self._weights: dict[int, float] = {}

    def add(self, space: str, names: Iterable[str], total: float, *, shared: bool = True) -> None:
        """Add distinct features of one space; `total` is shared among them in the Euclidean sense, or given to each."""
        distinct = set(names)
        weight = total / sqrt(max(len(distinct), 1)) if shared else total
        seed = crc32(space.encode() + b"\x01")
        for name in distinct:
            key = crc32(name.encode(), seed) % self._span + 1
            self._weights[key] = max(weight, self._weights.get(key, 0.0))

    def result(self) -> Weighted:
        """Return ids in ascending order and their weights."""
        keys = sorted(self._weights)
        return keys, [self._weights[key] for key in keys]


def pairs(words: list[str]) -> list[str]:
    """Return the pairs of neighbours, the first word paired with the start."""
    return [f"{a} {b}" for a, b in zip(["^", *words], words, strict=False)]


def grams(text: str, sizes: tuple[int, ...]) -> list[str]:
    """Return the runs of characters of these sizes."""
    return [text[start : start + size] for size in sizes for start in range(max(0, len(text) - size + 1))]


def to_ids(hashes: set[int], table_size: int) -> list[int]:
    """Fold 32-bit hashes into ids 1 .. table_size - 1, sorted, without repeats."""
    span = table_size - 1
    return sorted({value % span + 1 for value in hashes})
