"""The HTTP server in front of the sidecar: uvicorn, which drains here, and does not wait for ever for a request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from guard.sidecar.limits import Limits

HEAD_SECONDS = 30.0
"""That a connection gets for the next request's head."""
_SHUTDOWN_SECONDS = 5
MOST_AROUND = 512 * 1024
"""Bytes of one request that are not its body: head, chunk sizes, trailer. More than one read brings (256 KiB)."""
_FRAMED = 8
"""Bytes that bring one of a body in chunks, at most: `1 CR LF`, the byte itself, CR LF."""


class Timely(HttpToolsProtocol):
    """HTTP as uvicorn speaks it, but a connection that asks nothing is closed: uvicorn would keep it, and each costs an
    open file, of which a process has only so many. So is one whose head or trailer does not end: the parser keeps all
    of it in memory."""

    _due: asyncio.TimerHandle | None = None
    _came = _body = 0
    """Bytes since a request began, and those of its body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """From here on a request's head is waited for."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Bytes for the parser."""
        if self._came > MOST_AROUND + _FRAMED * self._body:
            self.transport.close()
            return
        super().data_received(data)
        self._came += len(data)

    def on_message_begin(self) -> None:
        """The parser has found another request."""
        super().on_message_begin()
        self._came = self._body = 0

    def on_body(self, body: bytes) -> None:
        """The parser has found some of a body."""
        super().on_body(body)
        self._body += len(body)

    def on_response_complete(self) -> None:
        """And for the next one's from here."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self.loop.call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        # With its head there, a request is the application's, which has limits of its own.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """Drains on SIGTERM. Ctrl-C, or a second SIGTERM, stops at once: what is under way gets 5 seconds."""

    def __init__(self, app: ASGIApp, limits: Limits, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=Timely, log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
            )
        )
        self._limits, self._drain_seconds = limits, drain_seconds
        self.lost = False
        """Whether the engine has stopped for good."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs as the signal's handler."""
        if sig == signal.SIGTERM and not self._limits.draining:
            self._limits.drain(self._drain_seconds)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """True ends the server."""
        return await super().on_tick(counter) or self._limits.drained


def open_many_files() -> None:
    """Lets this process open as many files as it may: every connection is one, and the usual 1,024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What the kernel will not give stays as it is.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def settle() -> None:
    """Takes what was loaded for good out of the garbage collector's sight: walking its 120,000 objects stopped every
    stream for 64 ms, twice in 161 requests."""
    gc.collect()
    gc.freeze()
