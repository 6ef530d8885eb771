"""Waiting for a server to serve a version: over real HTTP, from a server that says what a test tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from align import promote_cli
from align.promote_cli import wait_for
from guard.errors import UserError
from tests.guard.sidecar.conftest import running


def server(*told: dict[str, Any]) -> Starlette:
    """Answers /ready with one after the other, and goes on with the last."""
    answers: Iterator[dict[str, Any]] = iter(told)
    last = [told[-1]]

    async def ready(_: Request) -> JSONResponse:
        answer = next(answers, last[0])
        return JSONResponse(answer, 200 if answer["ready"] else 503)

    return Starlette(routes=[Route("/ready", ready)])


def test_it_waits_until_the_version_serves() -> None:
    old = {"ready": True, "version": 1, "version_problem": "version 2 is not served: an earlier try"}
    busy = {"ready": False, "reason": "the weights are being exchanged"}
    with running(server(old, busy, {"ready": True, "version": 2, "version_problem": None})) as url:
        assert wait_for(url + "/", 2) == f"{url}/ serves version 2."


def test_it_tells_why_a_server_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote_cli, "SEEN_SECONDS", 0.1)
    failed = {"ready": True, "version": 1, "version_problem": "version 2 is not served: its files"}
    with running(server(failed)) as url, pytest.raises(UserError, match="got version 2 is not served: its files"):
        wait_for(url, 2)
    with running(server({"ready": True, "version": 1})) as url, pytest.raises(UserError, match="got version 1"):
        wait_for(url, 2, seconds=0.6)
    with pytest.raises(UserError, match=r"got no answer \(ConnectError\)"):
        wait_for(url, 2, seconds=0.6)
