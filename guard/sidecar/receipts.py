"""Follows the engine's spool and hands each request its trace.

The files are read by offset as they grow. A line that is not finished yet is kept until its end comes; a damaged line
is counted and skipped. Only traces of requests in flight are held, so memory is bounded by those.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from guard.errors import UserError
from guard.traces import Trace

WAIT_SECONDS = 5.0
_FAST, _SLOW = 0.01, 0.25
_CHUNK = 8 * 1024 * 1024
#: A line longer than this is damage: it is dropped instead of held in memory.
_MAX_LINE = 256 * 1024 * 1024


@dataclass
class _File:
    offset: int
    tail: bytes = b""


@dataclass
class _Expected:
    trace: Trace | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)


class SpoolFollower:
    """Tails `spool-*.jsonl` in a directory. One event loop; `run` must be running for `wait` to see anything."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[Path, _File] = {}
        try:
            self._files = {path: _File(size) for path, size in self._sizes().items()}
        except FileNotFoundError:
            pass  # It will be made: whatever is in it then is new.
        except OSError as error:
            raise UserError(f"Trace directory {directory} cannot be read", got=error.strerror) from error
        self._expected: dict[str, _Expected] = {}
        self._wanted = asyncio.Event()
        self._waiting = 0
        self.malformed = 0
        """Lines that were no trace."""
        self.charge: Callable[[str, int], None] = lambda tenant, tokens: None
        """Told of each tenant's tokens, prompt and output, as traces are written: also of those whose client left."""

    @property
    def held(self) -> int:
        """How many requests are in flight: the bound on traces in memory."""
        return len(self._expected)

    def expect(self, guard_id: str) -> None:
        """From now on this request's trace is kept; call before the engine can write it."""
        self._expected[guard_id] = _Expected()

    def forget(self, guard_id: str) -> None:
        """The request is over."""
        self._expected.pop(guard_id, None)

    async def wait(
        self, guard_id: str, matches: Callable[[Trace], bool], timeout: float = WAIT_SECONDS
    ) -> Trace | None:
        """The request's newest trace as soon as it matches; after `timeout` seconds whatever there is, None if nothing.

        A preempted request is written more than once, and a later line replaces the earlier.
        """
        expected = self._expected[guard_id]
        self._waiting += 1
        self._wanted.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while expected.trace is None or not matches(expected.trace):
                        expected.news.clear()
                        await expected.news.wait()
            return expected.trace
        finally:
            self._waiting -= 1

    async def run(self) -> None:
        """Reads until cancelled: every 10 ms while a response waits for its receipt, else four times a second."""
        while True:
            self.poll()
            if self._waiting:
                await asyncio.sleep(_FAST)
                continue
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _SLOW)

    def poll(self) -> None:
        """Reads what the files have grown by. Where nobody can look (too many open files), everything waits."""
        try:
            sizes = self._sizes()
        except OSError:
            return
        for path in self._files.keys() - sizes.keys():
            del self._files[path]
        for path, size in sorted(sizes.items()):
            file = self._files.setdefault(path, _File(0))
            if size < file.offset:
                # Cut or replaced: what is in it now is new.
                file.offset, file.tail = 0, b""
            if size > file.offset:
                self._read(path, file)

    def _sizes(self) -> dict[Path, int]:
        """How large each file is; OSError when the directory cannot be read.

        A file that cannot be looked at is as it was: one forgotten would be read, and charged, again from its start.
        """
        sizes = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith("spool-") and entry.name.endswith(".jsonl"):
                    path = Path(entry.path)
                    try:
                        sizes[path] = entry.stat().st_size
                    except OSError:
                        if path in self._files:
                            sizes[path] = self._files[path].offset
        return sizes

    def _read(self, path: Path, file: _File) -> None:
        try:
            with path.open("rb") as source:
                source.seek(file.offset)
                while chunk := source.read(_CHUNK):
                    file.offset += len(chunk)
                    *lines, file.tail = (file.tail + chunk).split(b"\n")
                    for line in lines:
                        self._take(line)
        except OSError:
            return
        if len(file.tail) > _MAX_LINE:
            file.tail = b""
            self.malformed += 1

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            trace = Trace.model_validate_json(line)
        except (ValidationError, ValueError):
            self.malformed += 1
            return
        expected = self._expected.get(trace.guard_id)
        if trace.tenant:
            earlier = expected and expected.trace
            self.charge(trace.tenant, _tokens(trace) - (_tokens(earlier) if earlier else 0))
        if expected is not None:
            expected.trace = trace
            expected.news.set()


def _tokens(trace: Trace) -> int:
    return trace.prompt_tokens + trace.output_tokens
