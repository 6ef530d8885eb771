"""Held-out requests: from a file of the user's, or the demo's `report` topics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from align.evaluate import EvalRequest, Label
from guard.errors import UserError

if TYPE_CHECKING:
    from demo.topics import Split

#: Topics per label of the built-in set; each is asked in two wordings.
BUILT_IN: dict[Label, int] = {"harmful": 60, "benign": 30, "alarming": 30}


class RequestLine(BaseModel):
    """One line of a requests file."""

    model_config = ConfigDict(extra="ignore")

    request: str
    label: Label
    topic: str | None = None
    """What other wordings of it share; None: it stands alone."""
    benchmark: str = "requests"


def built_in(render: Callable[[str], list[int]], part: Split = "report") -> list[EvalRequest]:
    """The demo's held-out topics: at most 120 topics, two wordings each. `part` `detector`: those that recipes are
    chosen on (`align.curve`), which no report is about."""
    from demo.topics import load_topics

    left = dict(BUILT_IN)
    found = []
    for topic in load_topics(part):
        if left[topic.kind] == 0:
            continue
        left[topic.kind] -= 1
        for i, text in enumerate((topic.request, topic.request2)):
            found.append(
                EvalRequest(
                    id=f"{topic.id}-{i}", topic=topic.id, label=topic.kind, request=text, prompt_ids=render(text)
                )
            )
    return found


def training(render: Callable[[str], list[int]]) -> list[EvalRequest]:
    """What the demo's users ask: every `align` topic in its first wording. None of them is held out."""
    from demo.topics import load_topics

    return [
        EvalRequest(id=t.id, topic=t.id, label=t.kind, request=t.request, prompt_ids=render(t.request))
        for t in load_topics("align")
    ]


def from_file(path: Path, render: Callable[[str], list[int]]) -> list[EvalRequest]:
    """Requests of a JSON-lines file; a malformed line is a UserError that names it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"Requests file {path} cannot be read", got=error.strerror) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = RequestLine.model_validate(json.loads(line))
        except (ValidationError, ValueError) as error:
            raise UserError(
                f"Requests file {path}, line {number}",
                got=line[:80],
                wanted='{"request": text, "label": "harmful", "benign" or "alarming"}, perhaps `topic`, `benchmark`',
            ) from error
        found.append(
            EvalRequest(
                id=f"line-{number}", topic=row.topic or f"line-{number}", label=row.label, request=row.request,
                prompt_ids=render(row.request), benchmark=row.benchmark,
            )
        )  # fmt: skip
    return found
