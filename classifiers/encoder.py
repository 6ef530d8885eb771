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
from classifiers.normalise import normalise

Vector = npt.NDArray[np.float32]
MAX_TOKENS = 64
"""Of a step or a request; a longer text keeps its beginning and its end."""
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
        view = self._view(text)
        known = self._cache.get(view)
        if known is not None:
            # No lock: another thread may have let it go since.
            with contextlib.suppress(KeyError):
                self._cache.move_to_end(view)
            return known
        ids = shorten(self._tokenizer.encode(view).ids, MAX_TOKENS)
        (vectors,) = self._session.run(["vector"], {"ids": np.array([ids], np.int64)})
        vector = np.asarray(vectors[0], np.float32)
        self._cache[view] = vector
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return vector

    def count(self, text: str) -> int:
        """Return how many tokens a text has, without those that open and close it."""
        return len(self._tokenizer.encode(normalise(text), add_special_tokens=False).ids)


def shorten(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids: a long text's first half and its last, where cues and questions stand."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]
