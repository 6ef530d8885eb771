"""Words and phrases that tell how risky a request is; the judge's risk head learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from classifiers.data import LabelledRequest

REQUEST_WORDS = Path(__file__).parent / "banks" / "request_words.json"
WORD_WEIGHT = 0.5
"""Of a word, beside 1 for a whole request."""


def word_requests(path: Path = REQUEST_WORDS) -> list[LabelledRequest]:
    """Each word or phrase as a request of its kind."""
    words: dict[Literal["harmful", "benign"], list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return [
        LabelledRequest(request=word, label=label, source="words", licence="Apache-2.0")
        for label, entries in words.items()
        for word in entries
    ]
