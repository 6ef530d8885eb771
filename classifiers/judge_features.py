"""The judge's features: words, characters and shapes of a finished reasoning or answer, hashed, with weights.

Nothing here is the detector's: other texts, other features, other namespaces of the hash. A text's words share a fixed
total weight, so a long answer is not judged by its length.
"""

from __future__ import annotations

from collections.abc import Sequence

from classifiers.features import Bag, FeatureConfig, Weighted, grams, pairs, risk_bucket, words_of
from classifiers.normalise import normalise
from classifiers.shapes import answer_shapes, reasoning_shapes

JUDGE_FEATURES = FeatureConfig(table_size=2**17, max_words=400, risk_edges=(0.2, 0.5, 0.8))
MAX_CHARS = 6000
HEAD, TAIL, HEAD_CHARS = 30, 40, 160
WORDS, CHARS, SHAPES = 2.0, 1.0, 0.7
"""Total weight of a bag of words, of a bag of character n-grams, and of one shape."""


def judge_request_features(request: str, config: FeatureConfig) -> Weighted:
    """Return ids and weights that tell how risky a request is."""
    words = words_of(normalise(request, config.max_request_chars), config.max_words)
    bag = Bag(config.table_size)
    bag.add("jr.words", [*words, *pairs(words)], 2 * WORDS)
    bag.add("jr.stems", (word[:5] for word in words), WORDS)
    bag.add("jr.chars", grams(f" {' '.join(words)} " if words else "", (3, 4, 5)), WORDS)
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
    bag = Bag(config.table_size)
    if not words:
        return bag.result()
    bucket = risk_bucket(risk, config)
    kept = words if len(words) <= config.max_words else words[: config.max_words // 2] + words[-config.max_words // 2 :]
    bag.add(f"{space}.head", [*words[:HEAD], *pairs(words[:HEAD])], WORDS)
    bag.add(f"{space}.body", [*kept, *pairs(kept)], WORDS)
    bag.add(f"{space}.tail", [*words[-TAIL:], *pairs(words[-TAIL:])], WORDS)
    bag.add(f"{space}.chars", grams(text[:HEAD_CHARS], (3, 5)), CHARS)
    bag.add(f"{space}.shape", shapes, SHAPES, shared=False)
    bag.add(f"{space}.shape{bucket}", [*shapes, "*"], SHAPES, shared=False)
    return bag.result()
