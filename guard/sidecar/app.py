"""The sidecar's routes: an OpenAI-compatible front for one guarded engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from guard.sidecar.admin import RELOAD, reload
from guard.sidecar.chat import chat, completions, responses
from guard.sidecar.context import Sidecar
from guard.sidecar.errors import ApiError
from guard.sidecar.gate import KeyGate
from guard.sidecar.limits import Limited
from guard.sidecar.metrics import CONTENT_TYPE
from guard.sidecar.observe import Observed
from guard.sidecar.openapi import PATH, openapi
from guard.sidecar.upstream import checked

_POLL = 0.5
_GUARDED = "only POST /v1/chat/completions, /v1/responses and (where it is on) /v1/completions"
Hook = Callable[[], None]


def create_app(
    sidecar: Sidecar, *, on_ready: Hook | None = None, on_lost: Hook | None = None, pages: ASGIApp | None = None
) -> Starlette:
    """The application. `on_ready` is called when the guard was proven, `on_lost` when a dead engine stays dead.

    `pages`: the review pages; None: there are none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(sidecar.follower.run()), asyncio.create_task(_attend(sidecar, on_ready, on_lost))]
        if sidecar.versions is not None:
            tasks.append(asyncio.create_task(sidecar.versions.run()))
        if sidecar.upstreams is not None:
            tasks.append(asyncio.create_task(sidecar.upstreams.run()))
        if sidecar.reloader is not None:
            tasks.append(asyncio.create_task(sidecar.reloader.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await sidecar.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route(PATH, openapi),
            Route(RELOAD, reload, methods=["POST"]),
            *([] if pages is None else [Route("/guard", to_pages), Mount("/guard", app=pages)]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _crash},
        middleware=[Middleware(Observed), Middleware(KeyGate, sidecar=sidecar), Middleware(Limited, sidecar=sidecar)],
        lifespan=lifespan,
    )
    # It would send a body on to `http://` and the name that the client gave, past the TLS in front.
    app.router.redirect_slashes = False
    app.state.sidecar = sidecar
    return app


async def models(request: Request) -> Response:
    """The engine's models as it lists them, without its files; with the version in service where one is followed."""
    sidecar = _sidecar(request)
    response = await checked(await sidecar.take(request).client.models())
    try:
        listed = response.json()
        for card in listed["data"]:
            # A path on the server's disk.
            card.pop("root", None)
            if sidecar.versions is not None:
                card["version"] = sidecar.versions.serving.version
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ApiError(502, "engine_error", "The engine lists no models.") from error
    return JSONResponse(listed)


async def to_pages(request: Request) -> Response:
    """The pages' address as people type it."""
    return RedirectResponse("/guard/")


async def health(request: Request) -> Response:
    """200 while the engine's process lives and holds whole weights, or is being started again."""
    sidecar = _sidecar(request)
    if sidecar.versions is not None and sidecar.versions.broken is not None:
        return JSONResponse({"status": sidecar.versions.broken}, status_code=503)
    if not sidecar.alive():
        trying = sidecar.keeper is not None and sidecar.keeper.trying
        return JSONResponse({"status": "the engine has stopped"}, status_code=200 if trying else 503)
    return JSONResponse({"status": "ok" if sidecar.probe.proven else "starting"})


async def ready(request: Request) -> Response:
    """200 when a real forced injection was seen within the last minute, else 503 with the reason."""
    sidecar = _sidecar(request)
    reason = _down(sidecar) or await sidecar.probe.ready() or sidecar.exchanging
    if reason is not None:
        return JSONResponse({"ready": False, "reason": reason}, status_code=503)
    runtime = sidecar.runtime
    about: dict[str, object] = {
        "policy": runtime.policy.name, "policy_hash": runtime.policy.hash, "detector": runtime.detector.version,
    }  # fmt: skip
    if sidecar.versions is not None:
        about |= {"version": sidecar.versions.serving.version, "version_problem": sidecar.versions.problem}
    if sidecar.upstreams is not None:
        about["upstreams"] = sidecar.upstreams.states
    return JSONResponse({"ready": True, **about})


def _down(sidecar: Sidecar) -> str | None:
    if sidecar.limits.draining:
        return "this server is stopping"
    if not sidecar.alive():
        return "the engine has stopped"
    return None if sidecar.versions is None else sidecar.versions.broken


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(_sidecar(request).metrics.page(), headers={"content-type": CONTENT_TYPE})


def _sidecar(request: Request) -> Sidecar:
    sidecar: Sidecar = request.app.state.sidecar
    return sidecar


async def _attend(sidecar: Sidecar, on_ready: Hook | None, on_lost: Hook | None) -> None:
    """Proves the guard as soon as the engine is up, watches the engine, and has it started again."""
    while True:
        while sidecar.alive() and not sidecar.probe.proven:
            if await sidecar.upstream.healthy():
                await sidecar.probe.ready()
            await asyncio.sleep(_POLL)
        while sidecar.alive() and sidecar.exchanging is not None:
            await asyncio.sleep(_POLL)
        if sidecar.keeper is not None:
            sidecar.keeper.served |= sidecar.probe.proven
        if on_ready is not None and sidecar.probe.proven:
            on_ready()
        while sidecar.alive():
            await asyncio.sleep(_POLL)
        if sidecar.keeper is None or not await sidecar.keeper.start_again():
            break
    if on_lost is not None:
        on_lost()


async def _api_error(request: Request, error: Any) -> Response:
    response: JSONResponse = error.response()
    return response


async def _http_error(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path} is not served here: {_GUARDED} are guarded."
    # A 405 names the methods that there are.
    return ApiError(error.status_code, "not_found", message).response(error.headers)


async def _crash(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal_error", f"The sidecar failed ({type(error).__name__}).").response()
