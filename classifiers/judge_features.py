"""The judge's features: words, characters and shapes of a finished reasoning or answer, hashed, with weights.

Nothing here is the detector's: other texts, other features, other namespaces of the hash. A text's words share a fixed
total weight, so a long answer is not judged by its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from zlib import crc32

from classifiers.features import FeatureConfig, risk_bucket, words_of
from classifiers.normalise import normalise
from classifiers.shapes import answer_shapes, reasoning_shapes

JUDGE_FEATURES = FeatureConfig(table_size=2**17, max_words=400, risk_edges=(0.2, 0.5, 0.8))
MAX_CHARS = 6000
HEAD, TAIL, HEAD_CHARS = 30, 40, 160
WORDS, CHARS, SHAPES = 2.0, 1.0, 0.7
"""Total weight of a bag of words, of a bag of character n-grams, and of one shape."""

Weighted = tuple[list[int], list[float]]


class _Bag:
    """Collects hashed features with weights; a feature named twice keeps its largest weight."""

    def __init__(self, table_size: int) -> None:
        self._span = table_size - 1
        self._weights: dict[int, float] = {}

    def add(self, space: str, names: Iterable[str], total: float | None = None) -> None:
        """Add distinct features of one space; `total` is shared in the Euclidean sense; else each is SHAPES."""
        distinct = set(names)
        weight = SHAPES if total is None else total / sqrt(max(len(distinct), 1))
        seed = crc32(space.encode() + b"\x01")
        for name in distinct:
            key = crc32(name.encode(), seed) % self._span + 1
            self._weights[key] = max(weight, self._weights.get(key, 0.0))

    def result(self) -> Weighted:
        """Return ids in ascending order and their weights."""
        keys = sorted(self._weights)
        return keys, [self._weights[key] for key in keys]


def _grams(words: list[str]) -> list[str]:
    return words + [f"{a} {b}" for a, b in zip(["^", *words], words, strict=False)]


def _chars(text: str) -> list[str]:
    return [text[start : start + size] for size in (3, 5) for start in range(max(0, len(text) - size + 1))]


def judge_request_features(request: str, config: FeatureConfig) -> Weighted:
    """Return ids and weights that tell how risky a request is."""
    words = words_of(normalise(request, config.max_request_chars), config.max_words)
    bag = _Bag(config.table_size)
    bag.add("jr.words", _grams(words), 2 * WORDS)
    bag.add("jr.stems", (word[:5] for word in words), WORDS)
    return bag.result()


def answer_features(answer: str, risk: float, config: FeatureConfig) -> Weighted:
    """Return ids and weights of an answer to a request of this risk; empty for an answer without words."""
    raw = answer[:MAX_CHARS]
    text = normalise(raw, MAX_CHARS)
    return _features("ja", text, answer_shapes(raw, text), risk, config)


def reasoning_features(reasoning: str, risk: float, config: FeatureConfig) -> Weighted:
    """Return ids and weights of a reasoning on a request of this risk; empty for a reasoning without words."""
    # A long reasoning is judged by how it begins and how it ends.
    half = MAX_CHARS // 2
    raw = reasoning if len(reasoning) <= MAX_CHARS else reasoning[:half] + " " + reasoning[-half:]
    text = normalise(raw, MAX_CHARS + 1)
    return _features("jt", text, reasoning_shapes(text), risk, config)


def _features(space: str, text: str, shapes: Sequence[str], risk: float, config: FeatureConfig) -> Weighted:
    words = words_of(text, MAX_CHARS)
    bag = _Bag(config.table_size)
    if not words:
        return bag.result()
    bucket = risk_bucket(risk, config)
    kept = words if len(words) <= config.max_words else words[: config.max_words // 2] + words[-config.max_words // 2 :]
    bag.add(f"{space}.head", _grams(words[:HEAD]), WORDS)
    bag.add(f"{space}.body", _grams(kept), WORDS)
    bag.add(f"{space}.tail", _grams(words[-TAIL:]), WORDS)
    bag.add(f"{space}.chars", _chars(text[:HEAD_CHARS]), CHARS)
    bag.add(f"{space}.shape", shapes)
    bag.add(f"{space}.shape{bucket}", [*shapes, "*"])
    return bag.result()
