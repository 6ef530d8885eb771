"""Step labels of real reasoning: ids, offsets and labels ship with the project, the texts do not.

The labels were made by reading (`docs/labelling.md`). A line holds no text of its trace: whoever has the public set
puts both together with `join`. A text whose hash differs is left out and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from classifiers.data import read_rows
from classifiers.stats import Rate, bootstrap

Kind = Literal["harmful", "benign", "alarming"]
Label = Literal["cue", "trigger", "neutral"]
LABELS = Path(__file__).parent / "labels" / "steps.jsonl"
AUTHORED = Path(__file__).parent / "banks" / "traces"
LETTERS: dict[str, Label] = {"c": "cue", "t": "trigger", "n": "neutral"}
LABEL_EXAMPLE = '{"id": "t-1", "source": "star1", "sha256": "0123456789ab", "ends": [12, 40], "labels": "nt"}'
AUTHORED_EXAMPLE = (
    '{"id": "1", "lang": "en", "category": "fraud", "label": "harmful", "request": "...", "steps": [["...", "cue"]]}'
)
TRACE_EXAMPLE = '{"id": "t-1", "source": "star1", "request": "...", "request_label": "harmful", "reasoning": "..."}'


class TraceLabels(BaseModel):
    """The labels of one trace's first steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    source: str
    sha256: str = Field(pattern=r"^[0-9a-f]{12}$")
    """First 12 digits over the reasoning's UTF-8 bytes."""
    ends: list[int]
    """Where each labelled step ends in the reasoning, in characters; the first begins at 0."""
    labels: str = Field(pattern="^[ctn]*$")
    """One letter a step: cue, trigger, neutral."""
    unsure: list[int] = []
    """Steps that the labeller doubted."""
    second: str | None = Field(default=None, pattern="^[ctn]*$")
    """Another labeller's letters, made without sight of the first's."""

    @model_validator(mode="after")
    def _aligned(self) -> TraceLabels:
        if len(self.labels) != len(self.ends) or len(self.second or self.labels) != len(self.ends):
            raise ValueError("wanted one letter for each of `ends`")
        return self


class TraceText(BaseModel):
    """One recorded reasoning of a public set; further fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    source: str
    request: str
    request_label: Literal["harmful", "benign"]
    reasoning: str
    outcome: str = "unknown"


class AuthoredTrace(BaseModel):
    """A reasoning that was written for this project, with its labels; ships whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    lang: str
    category: str
    label: Kind
    request: str
    steps: list[tuple[str, Label]]
    answer: list[int] = []
    """Steps that stand in the answer; the others are reasoning."""

    @model_validator(mode="after")
    def _within(self) -> AuthoredTrace:
        if any(not 0 <= index < len(self.steps) for index in self.answer):
            raise ValueError(f"`answer` names a step that is not there; wanted 0 to {len(self.steps) - 1}")
        return self


@dataclass(frozen=True)
class LabelledTrace:
    """The steps of one reasoning with their labels, and what it answers."""

    id: str
    source: str
    request: str
    kind: Kind
    steps: tuple[str, ...]
    labels: tuple[Label, ...]
    unsure: frozenset[int] = frozenset()
    unlabelled: frozenset[int] = frozenset()
    """Steps that nobody has labelled: they are what came before another step, and are not learned from."""
    answer: frozenset[int] = frozenset()
    """Steps that stand in the answer; the others are reasoning."""
    outcome: str = "unknown"
    language: str = "en"
    category: str = ""


def text_hash(text: str) -> str:
    """12 hex digits that name a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_labels(path: Path = LABELS) -> list[TraceLabels]:
    """Read label lines; errors as `read_rows`."""
    return read_rows(path, TraceLabels, LABEL_EXAMPLE)


def read_texts(path: Path) -> list[TraceText]:
    """Read recorded reasonings; errors as `read_rows`."""
    return read_rows(path, TraceText, TRACE_EXAMPLE)


def read_authored(path: Path = AUTHORED) -> list[LabelledTrace]:
    """The authored traces of every language."""
    rows = [row for file in sorted(path.glob("*.jsonl")) for row in read_rows(file, AuthoredTrace, AUTHORED_EXAMPLE)]
    return [authored_trace(row) for row in rows]


def authored_trace(row: AuthoredTrace, source: str = "authored") -> LabelledTrace:
    """The trace of one line."""
    return LabelledTrace(
        id=row.id, source=source, request=row.request, kind=row.label, language=row.lang, category=row.category,
        steps=tuple(text for text, _ in row.steps), labels=tuple(label for _, label in row.steps),
        answer=frozenset(row.answer),
    )  # fmt: skip


def join(
    labels: Iterable[TraceLabels], texts: Iterable[TraceText], alarming: frozenset[str] = frozenset()
) -> tuple[list[LabelledTrace], Counter[str]]:
    """Traces of which both labels and text are at hand, and how many labels found no text or another one.

    `alarming` names sources whose benign requests sound harmful.
    """
    by_id = {text.id: text for text in texts}
    found: list[LabelledTrace] = []
    lost: Counter[str] = Counter()
    for row in labels:
        text = by_id.get(row.id)
        if text is None or text_hash(text.reasoning) != row.sha256:
            lost["no text" if text is None else "another text"] += 1
            continue
        starts = [0, *row.ends[:-1]]
        benign: Kind = "alarming" if row.source in alarming else "benign"
        found.append(
            LabelledTrace(
                id=row.id, source=row.source, request=text.request,
                kind="harmful" if text.request_label == "harmful" else benign,
                steps=tuple(text.reasoning[a:b] for a, b in zip(starts, row.ends, strict=True)),
                labels=tuple(LETTERS[letter] for letter in row.labels),
                unsure=frozenset(row.unsure), outcome=text.outcome,
            )
        )  # fmt: skip
    return found, lost


def agreement(rows: Sequence[TraceLabels]) -> dict[str, Rate]:
    """Cohen's kappa and raw agreement of the steps labelled twice, over all labels and cue against the rest."""
    from sklearn.metrics import cohen_kappa_score

    pairs = [(a, b) for row in rows if row.second for a, b in zip(row.labels, row.second, strict=True)]
    if not pairs:
        return {}
    first, second = (np.array([ord(letter) for letter in side]) for side in zip(*pairs, strict=True))
    cue = ord("c")
    return {
        "kappa": bootstrap(cohen_kappa_score, first, second),
        "kappa_cue": bootstrap(cohen_kappa_score, first == cue, second == cue),
        "same_label": Rate.of(int(np.sum(first == second)), len(pairs)),
    }
