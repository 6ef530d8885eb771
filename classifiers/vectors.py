"""Labelled traces as vectors: what the heads are trained and measured on once the encoder is fixed.

Public texts do not ship, their vectors do (`replay.npz`, int8, one scale a vector): an operator retrains the heads on
all the labels the shipped detector had, in a minute, without a GPU and without anybody's data set.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from classifiers.corpus import Part, part_of
from classifiers.encoder import Encoder, Vector
from classifiers.labels import Kind, Label, LabelledTrace

LABELS: tuple[Label, ...] = ("cue", "trigger", "neutral")
"""What the numbers in `EncodedTrace.labels` and the columns of the step head's logits mean."""
KINDS: tuple[Kind, ...] = ("harmful", "alarming", "benign")
Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class EncodedTrace:
    """A labelled trace without its text."""

    trace: LabelledTrace
    """Its steps are empty strings where the text is not at hand."""
    part: Part
    request: Vector
    """[width]"""
    steps: npt.NDArray[np.float32]
    """[n, width]"""
    ends: Ints
    """Where each step ends, in tokens of the encoder."""

    @property
    def labels(self) -> Ints:
        """Number of each step's label [n]."""
        return np.array([LABELS.index(label) for label in self.trace.labels], np.int64)

    @property
    def previous(self) -> npt.NDArray[np.float32]:
        """The vectors [n, width] of what came before each step; zeros before the first."""
        return np.concatenate([np.zeros_like(self.steps[:1]), self.steps[:-1]])


def encode_traces(
    encoder: Encoder, traces: Iterable[LabelledTrace], tick: Callable[[], object] = lambda: None
) -> list[EncodedTrace]:
    """Embed every trace with steps; `tick` is called after each."""
    found = []
    for trace in traces:
        if trace.steps:
            ends = np.cumsum([encoder.count(step) for step in trace.steps])
            steps = np.stack([encoder.embed(step) for step in trace.steps])
            found.append(EncodedTrace(trace, part_of(trace), encoder.embed(trace.request), steps, ends))
        tick()
    return found


def encode_requests(encoder: Encoder, requests: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the vectors [n, width] of requests."""
    return np.stack([encoder.embed(request) for request in requests])


@dataclass(frozen=True)
class RiskVectors:
    """Vectors [n, width] of requests and whether each is harmful [n]."""

    vectors: npt.NDArray[np.float32]
    harmful: npt.NDArray[np.float32]

    def joined(self, other: RiskVectors) -> RiskVectors:
        """Both, one after the other."""
        return RiskVectors(np.concatenate([self.vectors, other.vectors]), np.concatenate([self.harmful, other.harmful]))


def pack(traces: Sequence[EncodedTrace], risk: RiskVectors) -> bytes:
    """Return traces and requests as a compressed .npz without any text; vectors in int8."""
    columns: dict[str, Any] = {
        "id": [each.trace.id for each in traces],
        "source": [each.trace.source for each in traces],
        "language": [each.trace.language for each in traces],
        "outcome": [each.trace.outcome for each in traces],
        "kind": [KINDS.index(each.trace.kind) for each in traces],
        "part": [each.part for each in traces],
        "count": [len(each.steps) for each in traces],
        "label": np.concatenate([each.labels for each in traces]).astype(np.int8),
        "unsure": np.concatenate([[i in each.trace.unsure for i in range(len(each.steps))] for each in traces]),
        "end": np.concatenate([each.ends for each in traces]).astype(np.int32),
        "risk_label": risk.harmful.astype(np.int8),
    }
    for name, vectors in (
        ("step", np.concatenate([each.steps for each in traces])),
        ("request", np.stack([each.request for each in traces])),
        ("risk", risk.vectors),
    ):
        columns[f"{name}_scale"] = scale = np.abs(vectors).max(axis=1, keepdims=True).astype(np.float32) / 127
        columns[name] = np.round(vectors / scale).astype(np.int8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


def unpack(payload: bytes) -> tuple[list[EncodedTrace], RiskVectors]:
    """Read what `pack` wrote; nothing in it can run code (`allow_pickle` stays off)."""
    with np.load(io.BytesIO(payload), allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    steps, requests, risk = (
        data[name].astype(np.float32) * data[f"{name}_scale"] for name in ("step", "request", "risk")
    )
    traces = []
    stops = np.cumsum(data["count"])
    for number, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        span = slice(int(start), int(stop))
        trace = LabelledTrace(
            id=str(data["id"][number]), source=str(data["source"][number]), request="",
            kind=KINDS[int(data["kind"][number])], steps=("",) * int(stop - start),
            labels=tuple(LABELS[int(n)] for n in data["label"][span]),
            unsure=frozenset(np.flatnonzero(data["unsure"][span]).tolist()),
            outcome=str(data["outcome"][number]), language=str(data["language"][number]),
        )  # fmt: skip
        part = cast(Part, str(data["part"][number]))
        traces.append(EncodedTrace(trace, part, requests[number], steps[span], data["end"][span]))
    return traces, RiskVectors(risk, data["risk_label"].astype(np.float32))
