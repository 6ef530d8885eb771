"""The review pages as an application of its own, mounted at /guard: routes, log-in, headers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.sidecar.errors import ApiError
from guard.sidecar.limits import HEADERS
from guard.sidecar.pages import views
from guard.sidecar.pages.login import Logins, Sessions, is_ours, token
from guard.sidecar.pages.reviewers import Reviewers
from guard.sidecar.pages.site import ROOT, Asked, Site, View, render, to

MAX_FORM = 16 * 1024
_FORM = "application/x-www-form-urlencoded"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
Handler = Callable[[Request], Awaitable[Response]]


class _Headers:
    """Every response's headers: nothing foreign runs, frames or keeps these pages."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        await self._app(scope, receive, with_headers)


def create_pages(site: Site, reviewers: Reviewers, logins: Logins | None = None) -> ASGIApp:
    """The application, to be mounted at `ROOT`."""
    logins = logins or Logins(reviewers)

    def page(path: str, view: View) -> Route:
        return Route(path, _guarded(site, logins, view), methods=["GET"])

    def action(path: str, view: View) -> Route:
        return Route(path, _guarded(site, logins, view), methods=["POST"])

    app = Starlette(
        routes=[
            page("/", views.overview),
            page("/traces", views.traces),
            page("/traces/{guard_id}", views.trace),
            page("/review", views.queue),
            page("/versions", views.versions),
            page("/canary", views.canary),
            action("/label", views.label),
            action("/undo", views.undo),
            Route("/login", _login_page(logins), methods=["GET"]),
            Route("/login", _login(site, logins), methods=["POST"]),
            Route("/logout", _logout(site, logins), methods=["POST"]),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        middleware=[Middleware(Sessions, path=ROOT)],
        exception_handlers={HTTPException: _http_error, Exception: _crash},
    )
    # As in the sidecar: it would lead a browser to `http://`.
    app.router.redirect_slashes = False
    return _Headers(app)


def _guarded(site: Site, logins: Logins, view: View) -> Handler:
    """A view for reviewers only; a form must be one of ours too."""

    async def handle(request: Request) -> Response:
        reviewer = logins.who(request)
        if request.method == "POST":
            form = await _fields(request, site)
            if reviewer is None or not is_ours(request, form.get("csrf", "")):
                raise HTTPException(403, "This form is not from your session: log in and send it again.")
        elif reviewer is None:
            return to(f"/login?next={quote(_target(request), safe='')}")
        else:
            form = {}
        return await site.run(view, Asked(reviewer, token(request), request.query_params, request.path_params, form))

    return handle


def _login_page(logins: Logins) -> Handler:
    async def handle(request: Request) -> Response:
        if logins.who(request) is not None:
            return to("/")
        return _ask(request, request.query_params.get("next", ""))

    return handle


def _login(site: Site, logins: Logins) -> Handler:
    async def handle(request: Request) -> Response:
        form = await _fields(request, site)
        if not is_ours(request, form.get("csrf", "")):
            raise HTTPException(403, "This form is not from your session: open the log-in page and try again.")
        name, address = form.get("name", ""), request.client.host if request.client else ""
        if not logins.allowed(name, address):
            return _ask(request, form.get("next", ""), 429, "Too many tries. Wait five minutes.")
        # The password's hash takes 50 ms of a core.
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(site.pool, logins.reviewers.verify, name, form.get("password", "")):
            return _ask(request, form.get("next", ""), 401, "Name or password is wrong.")
        logins.forgive(name, address)
        logins.begin(request, name)
        return to(_safe(form.get("next", "")))

    return handle


def _logout(site: Site, logins: Logins) -> Handler:
    async def handle(request: Request) -> Response:
        if not is_ours(request, (await _fields(request, site)).get("csrf", "")):
            raise HTTPException(403, "This form is not from your session.")
        logins.end(request)
        return to("/login")

    return handle


def _ask(request: Request, target: str, status: int = 200, problem: str = "") -> Response:
    return render("login.html.j2", None, status, csrf=token(request), target=_safe(target), problem=problem)


def _target(request: Request) -> str:
    path = request.url.path.removeprefix(ROOT)
    return f"{path}?{request.url.query}" if request.url.query else path


def _safe(target: str) -> str:
    """A page of ours to go on to; anything else is the first page."""
    ours = target.startswith("/") and not target.startswith(("//", "/\\", "/static")) and target.isprintable()
    return target if ours and len(target) < 500 else "/"


async def _fields(request: Request, site: Site) -> dict[str, str]:
    """A form's fields, the last of equal names; HTTPException for anything that is no small form."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != _FORM:
        raise HTTPException(415, "Only forms are taken here.")
    try:
        body = await site.sidecar.limits.body(request, MAX_FORM)
    except ApiError as error:
        raise HTTPException(error.status, error.message, HEADERS.get(error.status)) from error
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=20))
    except ValueError as error:
        raise HTTPException(400, "The form cannot be read.") from error


async def _http_error(request: Request, error: Any) -> Response:
    missing = error.status_code == 404
    message = "There is no such page." if missing else error.detail
    title = "Not found" if missing else "That did not work"
    response = render("error.html.j2", None, error.status_code, title=title, message=message)
    response.headers.update(error.headers or {})
    return response


async def _crash(request: Request, error: Exception) -> Response:
    return render("error.html.j2", None, 500, title="The page failed", message=type(error).__name__)
