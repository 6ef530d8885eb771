"""Directories with one writer, files that are whole or only grow, and a full disk told in a sentence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from pydantic import BaseModel, ValidationError

from guard.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T", bound=BaseModel)


@contextlib.contextmanager
def one_writer(directory: Path, taken: UserError, *, name: str = ".lock", patience: float = 0.0) -> Iterator[None]:
    """Makes the directory and holds its lock; raises `taken` while another does, after `patience` seconds. The kernel
    drops it when we die."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("w") as handle:
        until = time.monotonic() + patience
        while (refused := _lock(handle)) is not None:
            if time.monotonic() >= until:
                raise taken from refused
            time.sleep(0.1)
        yield


def _lock(handle: TextIO) -> OSError | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turns a full disk, a used-up quota or a file-size limit into a UserError; what was on disk is whole, so that the
    same command goes on where it stopped."""
    try:
        yield
    # safetensors and torch raise errors of their own, with the kernel's words in them.
    except Exception as error:
        code = getattr(error, "errno", None)
        said = next((os.strerror(c) for c in _FULL if code == c or os.strerror(c) in str(error)), None)
        if said is None or isinstance(error, UserError):
            raise
        raise UserError(
            f"The disk under {path} is full", got=said,
            fix="Make room and run the same command again; it goes on where it stopped",
        ) from error  # fmt: skip


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one move: whoever is killed here leaves what was there before."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def append_line(path: Path, line: str) -> None:
    """Appends one line and waits until the disk has it; a line that an earlier crash tore is ended first."""
    with path.open("ab+") as lines:
        size = lines.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(lines.fileno(), 1, size - 1) != b"\n"
        lines.write((b"\n" if torn else b"") + line.encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The whole lines of a file, in order; a torn one is passed over, and no file has none."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValidationError):
            found.append(kind.model_validate_json(line))
    return found
