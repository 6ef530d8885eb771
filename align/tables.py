"""Traces and prompts as Parquet on any fsspec path, and prompts as JSON lines.

Flat columns can be queried; a trace's steps and receipt are JSON text, so that their schema may grow without breaking
older files.
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

_NESTED = ("steps", "receipt")


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

    text, ids = pa.string(), pa.list_(pa.int64())
    schema = pa.schema({
        "schema_version": pa.int64(), "guard_id": text, "created": pa.float64(), "model": text,
        "weights": text, "tokenizer_hash": text, "request": text, "tenant": text, "prompt_ids": ids, "output_ids": ids,
        "steps": text, "receipt": text,
    })  # fmt: skip
    rows = [trace.model_dump() for trace in traces]
    for row in rows:
        row.update({name: json.dumps(row[name], separators=(",", ":")) for name in _NESTED})
    return pa.Table.from_pylist(rows, schema=schema)


def prompt_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Prompts as rows."""
    import pyarrow as pa

    schema = pa.schema({"request": pa.string(), "tenant": pa.string()})
    return pa.Table.from_pylist([prompt.model_dump() for prompt in prompts], schema=schema)


def as_trace(row: dict[str, Any]) -> Trace:
    """A row of `trace_table`; ValueError (pydantic's too) when it is none."""
    return Trace.model_validate(row | {name: json.loads(row[name]) for name in _NESTED})


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
    report = ReadReport(files=1)
    found: dict[str, Trace] = {}
    for row in read_table(where).to_pylist():
        try:
            trace = as_trace(row)
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
