"""Reading labelled rows: JSONL files whose first bad line is named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from classifiers.normalise import normalise
from guard.errors import UserError

Row = TypeVar("Row", bound=BaseModel)
REQUEST_EXAMPLE = '{"request": "...", "label": "harmful", "source": "mine"}'


def read_rows(path: Path, schema: type[Row], example: str) -> list[Row]:
    """Read a JSONL file of `schema` rows; empty lines are skipped.

    UserError names the file and the number of the first line that is not such a row, and what is wrong with it.
    """
    try:
        # Not splitlines(): a JSON string may hold U+2028 and the like, which are no line ends of JSONL.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}", got=error.strerror or str(error), wanted="a JSONL file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", got=error.reason, wanted="a JSONL file in UTF-8") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(schema.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            what = f"{path} line {number} is malformed" + (f" at {key}" if key else "")
            raise UserError(what, got=first["msg"], wanted=f"a line like {example}") from None
    return rows


class LabelledRequest(BaseModel):
    """A request with its kind and where it is from; other fields of the line are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    request: str = Field(min_length=1)
    label: Literal["harmful", "benign"]
    source: str
    licence: str = "not given"


def read_requests(path: Path | None) -> list[LabelledRequest]:
    """Read labelled requests from a JSONL file, those that look the same to the scorer once; none without a file.

    Errors: `read_rows`.
    """
    first: dict[str, LabelledRequest] = {}
    for row in read_rows(path, LabelledRequest, REQUEST_EXAMPLE) if path else []:
        first.setdefault(normalise(row.request), row)
    return list(first.values())


def data_hash(rows: Iterable[BaseModel]) -> str:
    """Return the sha256 over the rows' JSON, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json().encode() + b"\n")
    return digest.hexdigest()
