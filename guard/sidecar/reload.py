"""Runs inside vLLM's API server: one route that puts other weights into the running engine.

vLLM's own routes for it exist in its development mode only, beside one that calls any method of a worker. This one
does the whole exchange at once, so that no request ever runs on half of a model: everything in flight is frozen and its
KV cache thrown away, the weights are loaded, and what was frozen goes on from its tokens. Weights that do not load are
put back before anything moves; when that fails too, requests are ended and the engine stays frozen. `EngineLock` stands
before this route.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/reasonguard/weights"
log = logging.getLogger(__name__)


class Exchange(BaseModel):
    """The body: which model to load, and which one to put back when that fails (paths or hub names)."""

    model_config = ConfigDict(extra="forbid")

    load: str
    back: str


class WeightsRoute:
    """ASGI middleware: answers POST on `PATH` and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 with the seconds it took; 409 when the old weights are back in place; 500 when the engine is frozen."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        response = await answer(Request(scope, receive))
        await response(scope, receive, send)


async def answer(request: Request) -> Response:
    """One exchange, from the request's body to its response."""
    try:
        wanted = Exchange.model_validate(json.loads(await request.body()))
    except (ValueError, ValidationError) as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    engine = request.app.state.engine_client
    began = time.perf_counter()
    # `keep` freezes requests; with `clear_cache` they are preempted, and recomputed under the new weights afterwards.
    await engine.pause_generation(mode="keep", clear_cache=True)
    problem = await _load(engine, wanted.load)
    if problem is not None:
        worse = await _load(engine, wanted.back)
        if worse is not None:
            # Nobody may wait for what never goes on.
            await engine.pause_generation(mode="abort", clear_cache=False)
            return JSONResponse({"error": f"{problem}; and putting back failed: {worse}"}, status_code=500)
    await engine.resume_generation()
    if problem is not None:
        return JSONResponse({"error": problem}, status_code=409)
    return JSONResponse({"seconds": time.perf_counter() - began})


async def _load(engine: Any, model: str) -> str | None:
    """What went wrong, or None."""
    try:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": model})
    except Exception as error:  # noqa: BLE001 - whatever it is, the old weights must come back
        log.error("weights of %s were not loaded: %s", model, error)
        return f"{type(error).__name__}: {error}"
    return None
