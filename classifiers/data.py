"""What a detector is trained on: steps with a label and the request they were thought under."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from classifiers.normalise import normalise
from guard.errors import UserError

Row = TypeVar("Row", bound=BaseModel)
EXAMPLE = '{"id": "1", "request": "...", "step": "...", "label": "cue", "request_label": "harmful", "source": "mine"}'

REQUEST_EXAMPLE = '{"request": "...", "label": "harmful", "source": "mine"}'


class LabelledStep(BaseModel):
    """One labelled step. Only a `cue` is to be answered by a trigger; the other labels are what it must not be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    request: str = Field(min_length=1)
    step: str
    """The step's text; empty in a row that only teaches how risky the request is."""
    label: Literal["cue", "trigger", "neutral"]
    request_label: Literal["harmful", "benign"]
    source: str
    weight: float = Field(default=1.0, gt=0)
    group: str = ""
    """Rows of one group (a topic) are never split between training and held-out rows; empty: the request."""
    wording: str = ""
    """Id of the sentence the step was rendered from; a wording is held out as a whole. Empty: none."""

    alarming: bool = False
    """A benign request that sounds harmful; such requests have a false-alarm rate of their own."""

    @property
    def topic(self) -> str:
        """The group, or the request where no group is given."""
        return self.group or self.request


def read_rows(path: Path, schema: type[Row], example: str) -> list[Row]:
    """Read a JSONL file of `schema` rows; empty lines are skipped.

    UserError names the file and the number of the first line that is not such a row, and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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


def read_steps(paths: Sequence[Path]) -> list[LabelledStep]:
    """Read labelled steps from JSONL files, duplicates dropped. Errors: `read_rows`."""
    return deduplicate(row for path in paths for row in read_rows(path, LabelledStep, EXAMPLE))


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


def deduplicate(rows: Iterable[LabelledStep]) -> list[LabelledStep]:
    """Keep the first of the rows whose request and step look the same to the scorer."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        key = (normalise(row.request), normalise(row.step))
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def data_hash(rows: Iterable[BaseModel]) -> str:
    """Return the sha256 over the rows' JSON, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json().encode() + b"\n")
    return digest.hexdigest()
