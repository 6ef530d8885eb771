"""Hashed features: a text becomes a list of int ids, and nothing else reaches the model.

Ids keep strings out of the ONNX graph, where a string tokenizer is slower and differs from the trainer's. The hash is
zlib.crc32, chained over the parts of a feature, so it is the same in every process and on every machine. Id 0 is
padding and belongs to no feature.
"""

from __future__ import annotations

import re
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field

from classifiers.normalise import normalise

SCHEME = 1
PADDING = 0
CJK = "\u3040-\u30ff\u3400-\u9fff"
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
    risk_edges: tuple[float, ...] = (0.15, 0.5, 0.85, 0.97)
    """Where the request's risk is cut into buckets."""


def words_of(text: str, limit: int) -> list[str]:
    """Split a normalised text into at most `limit` words; a Chinese or Japanese character is a word of its own."""
    return _WORD.findall(text)[:limit]


def risk_bucket(risk: float, config: FeatureConfig) -> int:
    """Return which bucket of the request's risk a step is crossed with, from 0 (harmless) upwards."""
    return sum(risk >= edge for edge in config.risk_edges)


def _seed(name: str) -> int:
    return crc32(name.encode() + b"\x00")


_UNI, _BI, _SKIP, _START = _seed("step.uni"), _seed("step.bi"), _seed("step.skip"), _seed("step.start")
_REQUEST, _REQUEST_BI, _REQUEST_STEM = _seed("req.uni"), _seed("req.bi"), _seed("req.stem")
_CROSS = [_seed(f"step.x{bucket}") for bucket in range(16)]
_CROSS_BI = [_seed(f"step.xb{bucket}") for bucket in range(16)]
_GAP = b" "
_STEM = 5
_OPENING = 3


def step_ids(step: str, bucket: int, config: FeatureConfig) -> list[int]:
    """Return the distinct ids of one step under a request of this risk bucket; [] for a step without words.

    Words, pairs of neighbours, pairs with one word between, the opening three words, and words and pairs crossed with
    the bucket. About 25 us for 20 words.
    """
    words = words_of(normalise(step), config.max_words)
    if not words:
        return []
    cross, cross_bi = _CROSS[bucket], _CROSS_BI[bucket]
    before, last = b"^", b"^"
    hashes = {cross}
    opening = _START
    for index, word in enumerate(words):
        code = word.encode() + _GAP
        pair = last + code
        hashes.update(
            (
                crc32(code, _UNI),
                crc32(code, cross),
                crc32(pair, _BI),
                crc32(pair, cross_bi),
                crc32(before + code, _SKIP),
            )
        )
        if index < _OPENING:
            opening = crc32(code, opening)
            hashes.add(opening)
        before, last = last, code
    return to_ids(hashes, config.table_size)


def request_ids(request: str, config: FeatureConfig) -> list[int]:
    """Return the distinct ids that tell a request's risk: words, neighbours and stems, in a space of their own."""
    text = normalise(request, config.max_request_chars)
    hashes: set[int] = set()
    last = b"^"
    for word in words_of(text, config.max_request_chars):
        code = word.encode() + _GAP
        hashes.update((crc32(code, _REQUEST), crc32(last + code, _REQUEST_BI)))
        hashes.add(crc32(word[:_STEM].encode(), _REQUEST_STEM))
        last = code
    return to_ids(hashes, config.table_size)


def to_ids(hashes: set[int], table_size: int) -> list[int]:
    """Fold 32-bit hashes into ids 1 .. table_size - 1, sorted, without repeats."""
    span = table_size - 1
    return sorted({value % span + 1 for value in hashes})
