"""Parts that the sidecar's tests share: the tiny tokenizer's runtime, and real HTTP servers on free ports."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from classifiers.detector import Detector
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.neutral import Neutraliser

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    """The tiny model's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture(scope="session")
def neutraliser(tokenizer: Tokenizer) -> Neutraliser:
    """Knows the tiny tokenizer's five special tokens."""
    return Neutraliser(tokenizer)


@pytest.fixture(scope="session")
def runtime(tokenizer: Tokenizer) -> GuardRuntime:
    """The default policy and the packaged detector on the tiny tokenizer."""
    return GuardRuntime.build(Policy(), Detector.load(), tokenizer, "tiny")


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serves an ASGI app from a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
