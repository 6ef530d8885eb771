"""What the detector learns from and is measured on, split once and for all by request, source and language.

The split is frozen in code: a request's part follows from its own hash, so new data can join without moving old rows
from one part to another, and no step is ever trained on whose request is measured on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from classifiers.data import LabelledRequest, read_requests, read_rows
from classifiers.labels import (
    AUTHORED_EXAMPLE,
    AuthoredTrace,
    Kind,
    LabelledTrace,
    authored_trace,
    join,
    read_authored,
    read_labels,
    read_texts,
)
from classifiers.normalise import normalise
from classifiers.wrapped import small_talk_requests

Part = Literal["train", "val", "test"]
PAIRS = Path(__file__).parent / "banks" / "request_pairs.jsonl"
UNSEEN_SOURCES = frozenset({"exaone45"})
"""Model families that are measured on and never learned from."""
UNSEEN_LANGUAGES = frozenset({"fr"})
ALARMING_SOURCES = frozenset({"exaone45"})
"""Public sources whose benign requests sound harmful."""
TEST_PERCENT, VAL_PERCENT = 18, 12
_DEMO: dict[str, Literal["cue", "trigger"]] = {
    "cue": "cue", "plan1": "cue", "plan2": "cue", "plan_close": "cue",
    "trigger": "trigger", "because": "trigger", "decide": "trigger",
}  # fmt: skip


class RequestPair(BaseModel):
    """Two requests that share their words and differ in what they ask for; ships whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    lang: str
    category: str
    harmful: str = Field(min_length=1)
    benign: str = Field(min_length=1)


@dataclass(frozen=True)
class Corpus:
    """Labelled traces and labelled requests of one training or measuring run."""

    traces: Sequence[LabelledTrace]
    requests: Sequence[LabelledRequest] = ()
    """For the risk of a request alone; none of them is a request of a measured trace."""
    missing: dict[str, int] = field(default_factory=dict)
    """Labels whose public text is not at hand."""

    def part(self, part: Part) -> list[LabelledTrace]:
        """The traces of one part, empty ones left out."""
        return [trace for trace in self.traces if trace.steps and part_of(trace) == part]

    @property
    def own(self) -> dict[Part, int]:
        """How many of the operator's traces each part has."""
        return {part: sum(trace.source == "own" for trace in self.part(part)) for part in get_args(Part)}


def percentile_of(request: str) -> int:
    """A number from 0 to 99 that belongs to a request however it is spelled."""
    return int(hashlib.sha256(normalise(request).encode()).hexdigest(), 16) % 100


def part_of_request(request: str) -> Part:
    """The part that a request belongs to by its hash."""
    percentile = percentile_of(request)
    if percentile < TEST_PERCENT:
        return "test"
    return "val" if percentile < TEST_PERCENT + VAL_PERCENT else "train"


def part_of(trace: LabelledTrace) -> Part:
    """The part that a trace belongs to: demo rows are trained on only, unseen families and languages measured only.

    An operator's own traces are learned from in every language: what they say of French is theirs to use.
    """
    if trace.source == "demo":
        return "train"
    if trace.source == "own":
        return part_of_request(trace.request)
    if trace.source in UNSEEN_SOURCES or trace.language in UNSEEN_LANGUAGES:
        return "test"
    return part_of_request(trace.request)


def read_corpus(
    texts: Path | None = None,
    requests: Path | None = None,
    own: Iterable[Path] = (),
    *,
    authored: bool = True,
    reviewed: Sequence[LabelledTrace] = (),
) -> Corpus:
    """Gather all there is: shipped labels with public texts if given, authored traces, demo rows, the operator's own
    files, and what was `reviewed` in the pages.

    Without `texts` the public traces are missing, and counted. Without `authored` those of the training part are left
    out: validated and measured is on the same traces whatever was learned from. Errors as `read_rows`.
    """
    found, missing = join(read_labels(), read_texts(texts), ALARMING_SOURCES) if texts else ([], Counter())
    written = [trace for trace in read_authored() if authored or part_of(trace) != "train"]
    traces = [*found, *written, *demo_traces()]
    for path in own:
        traces += [authored_trace(row, "own") for row in read_rows(path, AuthoredTrace, AUTHORED_EXAMPLE)]
    traces += reviewed
    measured = {normalise(trace.request) for trace in traces if part_of(trace) != "train"}
    asked = [*read_requests(requests), *([*pair_requests(), *small_talk_requests()] if authored else ())]
    return Corpus(traces, [row for row in asked if normalise(row.request) not in measured], dict(missing))


def demo_traces() -> list[LabelledTrace]:
    """The demo's detector rows: how the embedded model words its cues and triggers."""
    from demo.rows import render_rows

    return [
        LabelledTrace(
            id=f"demo-{number}", source="demo", request=row.request, kind=_kind(row.kind),
            steps=tuple(text for _, text in row.steps),
            labels=tuple(_DEMO.get(name, "neutral") for name, _ in row.steps),
        )
        for number, row in enumerate(render_rows("detector"))
    ]  # fmt: skip


def _kind(name: str) -> Kind:
    return "harmful" if name == "harmful" else "alarming" if name == "alarming" else "benign"


def read_pairs(path: Path = PAIRS) -> list[RequestPair]:
    """The authored contrast pairs."""
    return read_rows(path, RequestPair, '{"id": "pa-001", "lang": "en", "category": "...", "harmful": "...", ...}')


def pair_part(pair: RequestPair) -> Part:
    """The part of a contrast pair; both requests are always in the same one."""
    return part_of_request(pair.id)


def _sides(pair: RequestPair) -> tuple[tuple[str, Literal["harmful"]], tuple[str, Literal["benign"]]]:
    return (pair.harmful, "harmful"), (pair.benign, "benign")


def pair_requests(part: Part = "train") -> list[LabelledRequest]:
    """Both requests of the contrast pairs of one part."""
    return [
        LabelledRequest(request=text, label=label, source="pairs", licence="Apache-2.0")
        for pair in read_pairs()
        if pair_part(pair) == part
        for text, label in _sides(pair)
    ]
