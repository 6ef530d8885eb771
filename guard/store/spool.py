"""The spool's files as the store reads them: whole lines from an offset on, and what a file is known by."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from guard.traces import Trace

#: A line longer than this (bytes) is damage: it is passed over in pieces instead of held in memory.
MAX_LINE = 256 * 1024 * 1024
_PIECE = 1024 * 1024
_HASHED = 64 * 1024
_DAY = 86_400.0
_DATED = re.compile(r"spool-(\d{8})-")


@dataclass(frozen=True)
class Line:
    """One finished line of a file: where it begins, where the next one does, its text, its trace."""

    at: int
    end: int
    text: bytes
    """Without its line feed; only the beginning where the line was too long."""
    trace: Trace | None
    """None: the line is damaged."""

    @property
    def blank(self) -> bool:
        """Whether there is nothing in it: no trace, and no damage either."""
        return self.end - self.at <= len(self.text) + 1 and not self.text.strip()

    @property
    def hash(self) -> str:
        """SHA-256 of its beginning, the guard id included."""
        return hashlib.sha256(self.text[:_HASHED]).hexdigest()


def files(directory: Path) -> list[Path]:
    """The spool's files, the oldest first."""
    return sorted(directory.glob("spool-*.jsonl"))


def sizes(directory: Path) -> dict[Path, int]:
    """Bytes of each file of the spool, the oldest first."""
    found = {}
    for path in files(directory):
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_size
    return found


def lines(source: BinaryIO, offset: int) -> Iterator[Line]:
    """The finished lines from an offset on. What has no line feed yet is no line."""
    source.seek(offset)
    while True:
        text = source.readline(MAX_LINE)
        end = offset + len(text)
        if not text.endswith(b"\n"):
            if len(text) < MAX_LINE or (end := _pass_over(source, end)) < 0:
                return
            text = text[:_HASHED]
        yield Line(offset, end, text.removesuffix(b"\n"), _trace(text))
        offset = end


def identity(source: BinaryIO) -> str | None:
    """What a file is known by: the hash of the first trace in it, whose guard id no other file begins with.

    None: it holds no trace yet.
    """
    return next((line.hash for line in lines(source, 0) if line.trace is not None), None)


def holds(source: BinaryIO, at: int, end: int, wanted: str) -> bool:
    """Whether the file has the line with that hash there."""
    source.seek(at)
    return hashlib.sha256(source.read(min(_HASHED, end - at - 1))).hexdigest() == wanted


def is_read(source: BinaryIO, offset: int) -> bool:
    """Whether no finished line follows an offset."""
    return next(lines(source, offset), None) is None


def last_moment(path: Path) -> float:
    """Unix time after which nothing was appended: a file is written on one UTC day, the one in its name."""
    dated = _DATED.match(path.name)
    try:
        return timegm(time.strptime(dated[1], "%Y%m%d")) + _DAY if dated else path.stat().st_mtime
    except ValueError:
        return path.stat().st_mtime


def _trace(text: bytes) -> Trace | None:
    try:
        return Trace.model_validate_json(text)
    except ValidationError:
        return None


def _pass_over(source: BinaryIO, end: int) -> int:
    """Where a line that is too long ends; -1 while it goes on."""
    while piece := source.readline(_PIECE):
        end += len(piece)
        if piece.endswith(b"\n"):
            return end
    return -1
