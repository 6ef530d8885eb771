"""How a route words one chat completion: chat events in, the route's own bytes out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

DONE = b"data: [DONE]\n\n"
"""What ends a stream of OpenAI's."""


class Wording(Protocol):
    """One request's. Whoever guards the request speaks in chat completions, and knows no route."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A finished chat completion, receipt included, as the route's body."""

    def event(self, event: dict[str, Any], raw: bytes) -> Iterable[bytes]:
        """One chat chunk as the route's server-sent events; `raw` is its JSON as it came."""

    def last(self, event: dict[str, Any]) -> Iterable[bytes]:
        """The end of a stream: a chunk without choices that holds the receipt, and `error` where there is one."""


class ChatWording:
    """`/v1/chat/completions`: as it is."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The body itself."""
        return answer

    def event(self, event: dict[str, Any], raw: bytes) -> Iterable[bytes]:
        """The chunk itself."""
        yield b"data: " + raw + b"\n\n"

    def last(self, event: dict[str, Any]) -> Iterable[bytes]:
        """Shaped like OpenAI's usage chunk, so that clients that know nothing of receipts skip it."""
        yield data(event)
        yield DONE


def data(event: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumped(event) + b"\n\n"


def dumped(event: dict[str, Any]) -> bytes:
    """Compact ASCII JSON."""
    return json.dumps(event, separators=(",", ":")).encode()
