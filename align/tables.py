"""Traces and prompts as Parquet on any fsspec path, and prompts as JSON lines.

Traces have the shape of `guard.parquet`, which the store exports too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from align.sources import Prompt
from guard.errors import UserError
from guard.traces import ReadReport, Trace

if TYPE_CHECKING:
    import fsspec
    import pyarrow as pa


def is_parquet(where: str) -> bool:
    """Whether a path names Parquet: a file or directory `*.parquet`, or anything on another file system."""
    return "://" in where or where.rstrip("/").endswith(".parquet")


def open_path(where: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of `s3://...`, `gs://...`, a local path, ...; an unusable scheme is a UserError."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(where)
    except (ImportError, ValueError) as error:
        raise UserError(f"Path {where} cannot be used", got=str(error)) from error
    return filesystem, str(path)


def trace_table(traces: Iterable[Trace]) -> pa.Table:
    """Traces as rows."""
    import pyarrow as pa

    from guard.parquet import SCHEMA, trace_row

    return pa.Table.from_pylist([trace_row(trace) for trace in traces], SCHEMA)


def prompt_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Prompts as rows."""
    import pyarrow as pa

    schema = pa.schema({"request": pa.string(), "tenant": pa.string()})
    return pa.Table.from_pylist([prompt.model_dump() for prompt in prompts], schema=schema)


def write_table(table: pa.Table, where: str) -> None:
    """Writes one Parquet file in one move, so that a reader never sees half of it."""
    import pyarrow.parquet as pq

    filesystem, path = open_path(where)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    scratch = f"{path}.part"
    with filesystem.open(scratch, "wb") as sink:
        pq.write_table(table, sink)
    filesystem.mv(scratch, path)


def read_table(where: str) -> pa.Table:
    """A Parquet file, or all of a directory; UserError when there is none, or it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = open_path(where)
    try:
        return pq.read_table(path, filesystem=filesystem)
    except FileNotFoundError as error:
        raise UserError(f"{where} does not exist") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{where} is no Parquet", got=str(error).split("\n")[0]) from error


def read_trace_table(where: str) -> tuple[list[Trace], ReadReport]:
    """All traces of `where`; rows that are none are counted and skipped."""
    from guard.parquet import trace_of

    report = ReadReport(files=1)
    found: dict[str, Trace] = {}
    for row in read_table(where).to_pylist():
        try:
            trace = trace_of(row)
        except (ValueError, KeyError, TypeError):
            report.malformed += 1
            continue
        report.superseded += trace.guard_id in found
        found[trace.guard_id] = trace
    report.traces = len(found)
    return list(found.values()), report


def read_prompts(where: str) -> list[Prompt]:
    """Prompts of Parquet or of JSON lines; UserError that names the row that is none."""
    rows = read_table(where).to_pylist() if is_parquet(where) else _lines(where)
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Prompt.model_validate(row))
        except ValidationError as error:
            raise UserError(
                f"Prompts {where}, row {number}",
                got=repr(row)[:80],
                wanted='{"request": text, "tenant": text (optional)}',
            ) from error
    return found


def _lines(where: str) -> Iterator[Any]:
    filesystem, path = open_path(where)
    try:
        with filesystem.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield _json(line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Prompts {where} cannot be read", got=str(error)) from error


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        # Told with its row number by whoever validates it.
        return line.strip()
