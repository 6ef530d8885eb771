"""The HTTP server: connections that ask nothing, or without end, are closed, those that are answered are not; files."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from guard.errors import UserError
from guard.sidecar import server
from guard.sidecar.limits import Limits
from guard.sidecar.metrics import Metrics
from guard.sidecar.serve import bound
from guard.sidecar.server import Server, open_many_files, settle

HEAD = 0.3


async def _slow(request: Request) -> Response:
    await asyncio.sleep(2 * HEAD)
    return Response("done")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that waits 0.3 s for a request, and whose only route answers after twice that."""
    monkeypatch.setattr(server, "HEAD_SECONDS", HEAD)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Server(Starlette(routes=[Route("/", _slow)]), Limits(Metrics()), 0)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        running.should_exit = True
        thread.join()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n", b"\r\n"])
def test_a_connection_that_asks_nothing_is_closed(port: int, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        began = time.monotonic()
        connection.sendall(said)
        assert connection.recv(1) == b""
        assert HEAD / 2 < time.monotonic() - began < 5


@pytest.mark.parametrize("endless", [
    b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ",
])  # fmt: skip
def test_what_stands_around_a_body_is_not_kept_for_ever(
    port: int, monkeypatch: pytest.MonkeyPatch, endless: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 60.0)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(endless)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _pour(connection, 2 * server.MOST_AROUND)


def _pour(connection: socket.socket, size: int) -> None:
    for _ in range(size // 4096):
        connection.sendall(b"x" * 4096)
        # What the other side has closed meanwhile is known at the next one.
        time.sleep(0.001)


def test_a_long_body_in_small_chunks_is_taken(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n")
        assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_one_that_is_answered_late_is_not_closed_and_can_ask_again(port: int) -> None:
    with httpx.Client(trust_env=False) as http:
        ports = set()
        for _ in range(2):
            with http.stream("GET", f"http://127.0.0.1:{port}/") as response:
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                assert response.read() == b"done"
        assert len(ports) == 1


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_host_that_is_none_of_this_machines_is_named() -> None:
    for host in ("300.1.1.1", "192.0.2.1", "[::1]"):
        with pytest.raises(UserError, match=r"Cannot listen on .*Give another --host"), bound(host, 0):
            pass


def test_what_was_loaded_at_the_start_is_not_collected_again() -> None:
    loaded = len(gc.get_objects())
    try:
        settle()
        assert len(gc.get_objects()) < loaded / 10
    finally:
        gc.unfreeze()
