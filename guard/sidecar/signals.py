"""What `serve` does on Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.sidecar.admin import Reloader


@contextlib.contextmanager
def stop_by_signal() -> Iterator[None]:
    """SIGTERM and a closed terminal end `serve` the way Ctrl-C does: through its clean-up."""
    with handled(signal.default_int_handler):
        yield


@contextlib.contextmanager
def handled(handler: object) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP are answered by `handler` inside the block."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in numbers]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


@contextlib.contextmanager
def reload_by_signal(reloader: Reloader | None) -> Iterator[None]:
    """SIGHUP reloads, unless it comes because the terminal that `serve` was started at is gone: then `serve` ends."""
    had_terminal = has_terminal()

    def hang_up(number: int, frame: object) -> None:
        if reloader is None or (had_terminal and not has_terminal()):
            # uvicorn attends to this one, and lets requests end.
            signal.raise_signal(signal.SIGTERM)
        else:
            reloader.soon()

    before = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def has_terminal() -> bool:
    """Whether this process has a terminal that could be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
