"""Engines at `--upstream` that say what no engine says: nothing of it hangs, fails or looks guarded."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from guard.sidecar import upstream
from guard.sidecar.errors import ApiError
from guard.sidecar.upstream import Events, Upstream
from tests.guard.sidecar.engines import client_of
from tests.guard.sidecar.fronts import RemoteFront

Start = Callable[..., RemoteFront]


def _choice(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": None, **fields}]}).encode()


#: Data of events that were a crash, or another token than the engine's.
NO_EVENTS = (
    b"{nope", b"[1]", b'{"choices": null}', b'{"choices": [1]}', _choice(token_ids=["a"]), _choice(token_ids="abc"),
    _choice(token_ids=[-1]), _choice(token_ids=[None]), _choice(token_ids=[True]), _choice(token_ids=[1.5]),
    _choice(token_ids=[2**32]), _choice(token_ids=[7], finish_reason=7), _choice(token_ids=[7], index=1),
)  # fmt: skip
NO_TOKENS = (
    b"<html>", b"[1]", b'{"tokens": ["a"], "max_model_len": 9}', b'{"tokens": "abc", "max_model_len": 9}',
    b'{"tokens": [-5], "max_model_len": 9}', b'{"tokens": [5], "max_model_len": 1e999}',
    b'{"tokens": [5], "max_model_len": -1}', b'{"tokens": [5]}',
)  # fmt: skip


@contextlib.asynccontextmanager
async def saying(bodies: list[bytes], head: bytes = b"") -> AsyncIterator[Upstream]:
    """A client of an engine that answers each request with the next body."""
    left = iter(bodies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + head + b"\r\n" + next(left))
        writer.close()

    async with client_of(serve) as client:
        yield client


def test_events_that_cannot_be_read_are_an_engine_that_is_lost() -> None:
    async def ask() -> None:
        async with saying([b"data: " + data + b"\n\n" for data in NO_EVENTS]) as client:
            for data in NO_EVENTS:
                with pytest.raises(ApiError, match="says what cannot be read") as caught:
                    assert not [piece async for piece in client.continue_ids({})], data
                assert caught.value.status == 503, data

    asyncio.run(ask())


def test_tokens_that_are_none_are_an_engines_error() -> None:
    async def ask() -> None:
        async with saying(list(NO_TOKENS)) as client:
            for body in NO_TOKENS:
                with pytest.raises(ApiError, match="in a shape of its own") as caught:
                    assert not await client.render({}), body
                assert caught.value.status == 502

    asyncio.run(ask())


def test_a_health_check_outlives_a_body_that_cannot_be_unpacked() -> None:
    """One that raised ended the health checks of its engine for good."""

    async def ask() -> bool:
        async with saying([b"not packed at all"], b"content-encoding: gzip\r\n") as client:
            return await client.healthy()

    assert asyncio.run(ask()) is False


def test_an_event_that_never_ends_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "LONGEST_EVENT", 1000)
    events = Events()
    assert [events.cut(read) for read in (b"data: a\nda", b"ta: b\n")] == [[b"a"], [b"b"]]
    for _ in range(10):
        assert events.cut(b"x" * 100) == []
    with pytest.raises(ApiError, match="cannot be read"):
        events.cut(b"x" * 100)


def test_a_garbled_stream_ends_with_the_error_and_a_receipt_and_its_engine_is_out(remotes: Start) -> None:
    front = remotes(1)
    front.engines[0].says = b"data: {nope\n\n"
    *_, last = front.events()
    assert (last["error"]["code"], last["reasonguard"]["guarded"]) == ("engine_unavailable", False)
    assert front.upstreams.remotes[0].reason is not None
    front.engines[0].says = None
    front.wait({"1": "ok"})


def test_only_the_model_that_was_proven_can_be_asked_for(remotes: Start) -> None:
    """Behind the same address another model may answer, whose marks and tokens nobody has compared."""
    front = remotes(1)
    asked = len(front.engines[0].asked)
    status, answer = front.chat(model="other")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    assert answer["error"]["message"] == "The model `other` is not served here: only tiny."
    assert len(front.engines[0].asked) == asked
    assert [front.chat(model=name)[0] for name in ("tiny", "")] == [200, 200]


def test_a_list_of_models_that_is_none_is_an_engines_error(remotes: Start) -> None:
    front = remotes(1)
    front.engines[0].model = [1]  # type: ignore[assignment] # no name
    front.engines[0].cards = [7]  # type: ignore[list-item] # no card
    answer = front.http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["message"]) == (502, "The engine lists no models.")
