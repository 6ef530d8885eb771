"""Runs inside vLLM's API server: no route but `/health` answers without the key.

vLLM's own key covers only some prefixes: `/invocations` generates, and `/tokenize` answers, for anyone who can reach
the port (measured on 0.32), past the sidecar's firewall and receipts.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = frozenset({"/health"})


class EngineLock:
    """ASGI middleware; the key is the engine's environment variable. Without one nothing passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers 401; a WebSocket without the key is refused before it opens."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._wanted)
