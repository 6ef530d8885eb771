"""The encoder as the guard runs it: a text becomes a vector, one text at a time.

One at a time because int8 activations are scaled by the largest value in a batch: a step's vector would depend on the
steps of other requests, and two runs could decide differently.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from classifiers.artifact import session
from classifiers.normalise import MAX_CHARS, normalise
from classifiers.windows import units_of, windows

Vector = npt.NDArray[np.float32]
MAX_TOKENS = 64
"""Of a text that becomes one vector; a longer one keeps its beginning and its end, and has `windows`."""
CACHED = 4096


class Encoder:
    """Embeds the scorer's view of texts; remembers the last 4,096, so that a step's predecessor costs nothing."""

    def __init__(self, model: bytes, tokenizer: bytes, name: str, view: Callable[[str], str] = normalise) -> None:
        """`view`: what the scorer sees of a text."""
        self._view = view
        self._session = session(model, name)
        self._tokenizer = Tokenizer.from_str(tokenizer.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cache: OrderedDict[str, Vector] = OrderedDict()

    def embed(self, text: str) -> Vector:
        """Return the vector [width] of a text as the scorer sees it; the same text always has the same vector."""
        return self.embed_view(self._view(text))

    def embed_view(self, view: str) -> Vector:
        """Return the vector [width] of what the scorer sees."""
        known = self._cache.get(view)
        if known is not None:
            # No lock: another thread may have let it go since.
            with contextlib.suppress(KeyError):
                self._cache.move_to_end(view)
            return known
        vector = self.vector(shorten(self._tokenizer.encode(view).ids, MAX_TOKENS))
        self._cache[view] = vector
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return vector

    def vector(self, ids: list[int]) -> Vector:
        """Return the vector [width] of token ids, the opening and the closing one included."""
        (vectors,) = self._session.run(["vector"], {"ids": np.array([ids], np.int64)})
        return np.asarray(vectors[0], np.float32)

    def windows(self, text: str) -> list[list[int]]:
        """Return the token windows of a text: one, what `embed` reads, where the encoder takes it whole."""
        whole = self._tokenizer.encode(self._view(text)).ids
        if len(text) <= MAX_CHARS and len(whole) <= MAX_TOKENS:
            return [whole]
        found = windows(units_of(text, self._inner), MAX_TOKENS - 2)
        return [[whole[0], *ids, whole[-1]] for ids in found] or [shorten(whole, MAX_TOKENS)]

    def text(self, ids: list[int]) -> str:
        """Return the words of a window."""
        words: str = self._tokenizer.decode(ids)
        return words

    def _inner(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(self._view(text), add_special_tokens=False).ids
        return ids

    def count(self, text: str) -> int:
        """Return how many tokens a text has, without those that open and close it."""
        return len(self._tokenizer.encode(normalise(text), add_special_tokens=False).ids)


def shorten(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids: a long text's first half and its last, where cues and questions stand."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]
