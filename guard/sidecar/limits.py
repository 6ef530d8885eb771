"""How many requests are under way, how long one and its body may take, and when none is taken any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.policy import Policy
from guard.sidecar.errors import ApiError, Refused
from guard.sidecar.metrics import Metrics
from guard.sidecar.observe import note
from guard.sidecar.proof import ID_HEADER, Attached

if TYPE_CHECKING:
    from guard.sidecar.context import Sidecar

STREAMS, SECONDS, BODY, DRAIN = 512, 1800.0, 30.0, 30.0
_WAITING = 256 * 1024 * 1024
"""Bytes that bodies may hold together whose end has not come: they take no place, so nothing else bounds them."""
_LAST_WORDS = 5.0
"""Seconds that a client that reads slowly gets to be told."""


class Limits:
    """One sidecar's limits and what is under way. `streams`, `seconds` and `body_seconds`: 0 is no limit."""

    def __init__(
        self, metrics: Metrics, streams: int = STREAMS, seconds: float = SECONDS, body_seconds: float = BODY
    ) -> None:
        self._metrics, self._streams, self.seconds, self.body_seconds = metrics, streams, seconds, body_seconds
        self._drained_by, self._waiting = float("inf"), 0
        self.under_way = 0
        self.draining = False

    def drain(self, seconds: float) -> None:
        """From now on no request is taken; those under way get so long to end. Safe inside a signal handler."""
        self._drained_by = time.monotonic() + seconds
        self.draining = True

    @property
    def drained(self) -> bool:
        """Whether it may stop: nothing is under way, or it has had its time."""
        return self.draining and (not self.under_way or time.monotonic() >= self._drained_by)

    def check_free(self) -> None:
        """ApiError 503 when no request can be taken."""
        if self.draining:
            raise self._turned_away("drain", 503, "draining", "This server is stopping.")
        if self._streams and self.under_way >= self._streams:
            sentence = f"{self.under_way} requests are under way, as many as are taken at once."
            raise self._turned_away("streams", 503, "overloaded", sentence)

    async def body(self, request: Request, most: int) -> bytes:
        """A request's whole body. Refused 413 when it is larger than `most`, ApiError 408 when it takes longer than it
        may, 503 when too much of others is waited for; ClientDisconnect."""
        try:
            async with asyncio.timeout(self.body_seconds or None):
                return await self._read(request, most)
        except TimeoutError:
            sentence = f"The body took longer than {self.body_seconds:g} s."
            raise self._turned_away("body", 408, "body_timeout", sentence) from None

    async def _read(self, request: Request, most: int) -> bytes:
        too_large = Refused(f"The body is larger than {most} bytes.", code="body_too_large", status=413)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._waiting += len(chunk)
                if len(body) > most:
                    raise too_large
                if self._waiting > _WAITING:
                    raise self._turned_away("body", 503, "overloaded", "Too many bodies are on their way.")
            return bytes(body)
        finally:
            self._waiting -= len(body)

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """One request, from its body's last byte to its response's. ApiError 503 when it cannot be taken."""
        self.check_free()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def too_long(self) -> ApiError:
        """What a request is told that took longer than it may."""
        return self._turned_away("time", 504, "request_timeout", f"The request took longer than {self.seconds:g} s.")

    def _turned_away(self, limit: str, status: int, code: str, sentence: str) -> ApiError:
        self._metrics.turned_away.labels(limit).inc()
        note(result="turned_away")
        return ApiError(status, code, sentence)


#: What an answer of ours carries: a 503 is over soon, and of a body that never came nothing more is waited for.
HEADERS = {503: {"retry-after": "1"}, 408: {"connection": "close"}}


class Limited:
    """ASGI middleware: keeps every POST below `/v1/` within the limits. Who has not sent its body takes no place."""

    def __init__(self, app: ASGIApp, sidecar: Sidecar) -> None:
        self._app, self._sidecar = app, sidecar

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, refuses it, or cancels it when its time is over: then the engine's part ends too."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        limits, answer = self._sidecar.limits, _Answer(send)
        try:
            # Whoever cannot be taken is told before it sends anything.
            limits.check_free()
            body = await limits.body(Request(scope, receive), self._sidecar.max_body)
            with limits.one_more():
                async with asyncio.timeout(limits.seconds or None) as clock:
                    await self._app(scope, _replayed(body, receive), answer)
        except ApiError as error:
            if isinstance(error, Refused):
                self._sidecar.metrics.requests.labels("refused").inc()
            await error.response(HEADERS.get(error.status))(scope, receive, send)
        except ClientDisconnect:
            self._sidecar.metrics.requests.labels("disconnected").inc()
            await Response(status_code=499)(scope, receive, send)
        except TimeoutError:
            if not clock.expired():
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self._cut(answer, scope, receive, send)

    async def _cut(self, answer: _Answer, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._sidecar.limits.too_long()
        if answer.began is None:
            await error.response()(scope, receive, send)
        elif answer.began.get(b"content-type", b"").startswith(b"text/event-stream") and not answer.ended:
            guard_id, state = answer.began.get(ID_HEADER.encode(), b"").decode(), scope["state"]
            # The route's own words: it knows which of its items and events are still open.
            last = state["wording"].last(_last_event(guard_id, error, state["tenant"].policy))
            await send({"type": "http.response.body", "body": b"".join(last)})


def _last_event(guard_id: str, error: ApiError, policy: Policy) -> dict[str, Any]:
    receipt = Attached(
        guard_id=guard_id, guarded=False, reason=error.message, mode=policy.mode, policy=policy.name,
        policy_hash=policy.hash,
    )  # fmt: skip
    event = {"object": "chat.completion.chunk", "choices": [], "reasonguard": receipt.model_dump(exclude_none=True)}
    return event | error.body()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    read = False

    async def again() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class _Answer:
    """`send`, remembering how far a response has got."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.began: dict[bytes, bytes] | None = None
        """Its headers, once they were sent."""
        self.ended = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.began = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        return self._send(message)
