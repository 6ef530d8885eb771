"""When connections to the engine are used again, and when not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from vllm import envs

from guard.sidecar.errors import ApiError
from guard.sidecar.upstream import IDLE_SECONDS, Upstream
from tests.guard.sidecar.engines import client_of

ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"data":[]}'


@contextlib.asynccontextmanager
async def engine(opened: list[int]) -> AsyncIterator[Upstream]:
    """An engine that answers every request alike and notes how many requests each connection brought."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(0)
        number = len(opened) - 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                opened[number] += 1
                writer.write(ANSWER)
                await writer.drain()
        writer.close()

    async with client_of(serve) as client:
        yield client


@pytest.mark.parametrize(("rest", "connections"), [(0.0, [2]), (IDLE_SECONDS + 0.2, [1, 1])])
def test_a_connection_is_used_again_unless_the_engine_may_be_closing_it(rest: float, connections: list[int]) -> None:
    opened: list[int] = []

    async def ask() -> None:
        async with engine(opened) as upstream:
            assert (await upstream.models()).status_code == 200
            await asyncio.sleep(rest)
            assert (await upstream.models()).status_code == 200

    asyncio.run(ask())
    assert opened == connections


def test_vllm_keeps_connections_for_longer() -> None:
    assert IDLE_SECONDS < envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE


@pytest.mark.parametrize(("bytes_sent", "said"), [
    (b"SSH-2.0-OpenSSH\r\n\r\n", "cannot be reached"), (b"", "cannot be reached"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", "cannot be reached"),
])  # fmt: skip
def test_what_is_no_answer_is_an_engine_that_cannot_be_reached(bytes_sent: bytes, said: str) -> None:
    async def ask() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(bytes_sent)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
        try:
            with pytest.raises(ApiError, match=said) as caught:
                await upstream.ask({})
            assert (caught.value.status, await upstream.healthy()) == (503, False)
        finally:
            await upstream.close()
            server.close()

    asyncio.run(ask())


def test_hundreds_of_streams_do_not_wait_for_one_another() -> None:
    """aiohttp's own limit is 100 connections, and the sidecar's 512 streams."""

    async def ask() -> None:
        waiting, all_there = 0, asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal waiting
            await reader.readuntil(b"\r\n\r\n")
            waiting += 1
            if waiting == 150:
                all_there.set()
            await all_there.wait()
            writer.write(ANSWER)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
        try:
            async with asyncio.timeout(30):
                answers = await asyncio.gather(*(upstream.ask({}) for _ in range(150)))
            assert {answer.status_code for answer in answers} == {200}
        finally:
            await upstream.close()
            server.close()

    asyncio.run(ask())
