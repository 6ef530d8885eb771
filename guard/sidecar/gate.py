"""The first thing that a request meets: whose key it carries, and whether that tenant has anything left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard.sidecar.errors import ApiError
from guard.sidecar.quotas import OverQuota

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from guard.sidecar.context import Sidecar

#: Open to whoever reaches the port: they hold no content. What lies under `/guard/` asks for its own login.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})
OWN_LOGIN = "/guard/"


class KeyGate:
    """ASGI middleware: answers 401 and 429, else puts the tenant into the request's state (`request.state.tenant`).

    A request is under way until its response has ended, streams included. Without keys it lets everyone through.
    """

    def __init__(self, app: ASGIApp, sidecar: Sidecar) -> None:
        self._app, self._sidecar = app, sidecar

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets one request through, or answers it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["path"].startswith(OWN_LOGIN):
            await self._app(scope, receive, send)
            return
        sidecar = self._sidecar
        tenant = sidecar.tenant(_authorization(scope))
        if tenant is None:
            sidecar.metrics.requests.labels("unauthorized").inc()
            refused = ApiError(401, "invalid_api_key", "This server takes a key that its operator gave out.")
            await refused.response({"www-authenticate": "Bearer"})(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            sidecar.meter.enter(tenant)
        except OverQuota as error:
            sidecar.metrics.requests.labels("limited").inc()
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            sidecar.meter.leave(tenant)


def _authorization(scope: Scope) -> str:
    given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return given.decode("latin-1")
