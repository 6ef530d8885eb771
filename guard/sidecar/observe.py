"""One span and one log line for each request: how it ended, under which policy, how long it took. Never content."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.sidecar import tracing
from guard.sidecar.tracing import Value

if TYPE_CHECKING:
    from guard.sidecar.proof import Attached

log = logging.getLogger(__name__)
_about: ContextVar[dict[str, Value]] = ContextVar("about")
#: What a log line takes of what was noted.
_LOGGED = ("guard_id", "result", "policy", "policy_hash", "mode")


def note(**facts: Value | None) -> None:
    """Adds to what is known of the request under way; outside a request it does nothing."""
    found = {name: value for name, value in facts.items() if value is not None}
    about = _about.get(None)
    if about is not None:
        about.update(found)
    tracing.note(**found)


def note_receipt(attached: Attached) -> None:
    """The receipt's names and counts."""
    note(
        guard_id=attached.guard_id, guarded=attached.guarded, seen=attached.seen, unscored=attached.unscored,
        interventions=attached.interventions, unanswered=attached.unanswered, mode=attached.mode,
        policy=attached.policy, policy_hash=attached.policy_hash, version=attached.version,
    )  # fmt: skip


class Observed:
    """ASGI middleware: what is POSTed. A path that is no route is called `other`: it comes from the client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watches the response go by."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        route, began, status = _route(scope), time.perf_counter(), 0

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            # Handed on, not awaited: a frame less for each streamed token.
            return send(message)

        about: dict[str, Value] = {}
        before = _about.set(about)
        try:
            with tracing.request_span("POST", route, Headers(scope=scope)) as span:
                try:
                    await self._app(scope, receive, watched)
                finally:
                    if span is not None:
                        span.set_attribute("http.response.status_code", status)
                    seconds = round(time.perf_counter() - began, 6)
                    fields = {name: about.get(name) for name in _LOGGED} | {"trace_id": tracing.trace_id()}
                    log.info("request", extra={"event": "request", "route": route, "status": status,
                                               "seconds": seconds, **fields})  # fmt: skip
        finally:
            _about.reset(before)


def _route(scope: MutableMapping[str, Any]) -> str:
    known = {getattr(route, "path", None) for route in scope["app"].routes}
    path: str = scope["path"]
    return path if path in known else "other"
