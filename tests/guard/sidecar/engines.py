"""An engine written out byte by byte, and the sidecar's client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from guard.sidecar.upstream import Upstream


@contextlib.asynccontextmanager
async def client_of(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Upstream]:
    """A client of an engine that does with each connection what `serve` does."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
    try:
        yield client
    finally:
        await client.close()
        server.close()
