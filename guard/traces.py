"""Traces and receipts: their schema, the spool that is written, the reader that tolerates damage.

A trace is the full record of one guarded request in token ids; its receipt says what the guard did. The spool is
append-only: one JSON line per trace in one `write`, so that a `kill -9` can lose at most a line that was never
finished, and readers skip a torn line, count it and leave it where it is.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import UserError
from guard.steps import Zone

SCHEMA_VERSION = 1
Mode = Literal["inject", "substitute"]
Rung = Literal["trigger", "strong", "refuse", "stop"]
"""How hard an intervention is."""
LogContent = Literal["full", "ids", "none"]
"""What is kept of a request's content: text and token ids, token ids alone, or neither."""


@dataclass(slots=True)
class StepRecord:
    """One step as the guard saw it; `start`, `end` are output token indices, half open.

    No pydantic model: one is made between two engine steps, and a model takes 10 us, this 0.5.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    start: int
    end: int
    zone: Zone
    score: float | None
    """Probability that the step is a cue; None: unscored, or made of forced tokens."""
    cue: bool
    injected: bool = False
    unreadable: bool = False
    """Enciphered or encoded, so that its score says nothing."""


class Intervention(BaseModel):
    """A cue answered by a trigger."""

    model_config = ConfigDict(extra="forbid")

    step: int
    """Index in the trace's steps: of the cue (`inject`), of the trigger in its place (`substitute`)."""
    at: int
    """Output index of the first forced token."""
    trigger_id: str
    """Of the pool, or `refuse`, or `stop`."""
    rung: Rung = "trigger"
    mode: Mode = "inject"
    cue_ids: list[int] = []
    """The ids that the trigger replaced (`substitute`): the cue, and the delimiter that closed it."""
    score: float | None
    forced: int = 0
    """Forced tokens that the engine really appended."""
    completed: bool = False


class Receipt(BaseModel):
    """What the guard did for one request."""

    model_config = ConfigDict(extra="forbid")

    guard_id: str
    policy: str
    policy_hash: str
    detector: str
    engine: str
    shadow: bool = False
    seen: int = 0
    scored: int = 0
    unscored: int = 0
    unreadable: int = 0
    """Steps that looked enciphered or encoded (ROT13, base64); the policy says what they mean."""
    interventions: list[Intervention] = Field(default_factory=list)
    injected_tokens: int = 0
    enforcement_failed: int = 0
    errors: list[str] = Field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every step was scored and every forced token appended."""
        return not (self.unscored or self.enforcement_failed or self.errors)


class Lengths(BaseModel):
    """How many ids a trace had before they were left out."""

    model_config = ConfigDict(extra="forbid")

    prompt: int
    output: int
    replaced: int
    """Of the cues that triggers took the place of."""


class GuardTime(BaseModel):
    """How long a request waited for the guard, in microseconds. Told by a clock, not by the tokens: nothing is decided
    by it, and no replay gives it again."""

    model_config = ConfigDict(extra="forbid")

    request: int = Field(default=0, ge=0)
    """Until what was asked had been read and put before the detector."""
    steps: list[Annotated[int, Field(ge=0)]] = []
    """Each round of scoring in which a step of it was judged, in order. Requests that are judged in one round wait for
    all of it, so it counts whole for each."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.request + sum(self.steps)


def us_since(began: int) -> int:
    """Whole microseconds since a reading of `time.perf_counter_ns`."""
    return (time.perf_counter_ns() - began) // 1000


class Trace(BaseModel):
    """The full record of one guarded request."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    guard_id: str
    created: float
    """Unix time in seconds."""
    model: str
    weights: str = ""
    """`guard.weights.weights_hash` of the model when the request ended; empty in traces from before it was kept."""
    tokenizer_hash: str
    request: str
    tenant: str = ""
    """The name of the key that the request came with, empty without keys; pairs have quotas per tenant."""
    prompt_ids: list[int]
    output_ids: list[int]
    log_content: LogContent = "full"
    """What was kept: but for `full` the request is empty, and for `none` so are the ids."""
    lengths: Lengths | None = None
    """How many ids there were; only where they were left out."""
    steps: list[StepRecord]
    receipt: Receipt
    guard_time: GuardTime | None = None
    """None in traces from before it was kept."""

    @property
    def guard_us(self) -> int | None:
        """Microseconds that the request waited for the guard, as far as they were kept."""
        return None if self.guard_time is None else self.guard_time.total

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt had, kept or not."""
        return self.lengths.prompt if self.lengths else len(self.prompt_ids)

    @property
    def output_tokens(self) -> int:
        """How many tokens were generated, kept or not."""
        return self.lengths.output if self.lengths else len(self.output_ids)

    @property
    def replaced_tokens(self) -> int:
        """How many tokens triggers took the place of, kept or not."""
        return self.lengths.replaced if self.lengths else sum(len(i.cue_ids) for i in self.receipt.interventions)

    @property
    def stepless_tokens(self) -> int:
        """How many generated tokens stand in no step: outside the watched zones, and the marks between zones."""
        return max(0, self.output_tokens - sum(step.end - step.start for step in self.steps))

    @property
    def cues(self) -> int:
        """How many there were, those that are no step any more because a trigger took their place included."""
        replaced = sum(each.mode == "substitute" for each in self.receipt.interventions)
        return sum(step.cue for step in self.steps) + replaced

    def keeping(self, content: LogContent) -> Trace:
        """A copy that holds no more than `content`; what was left out before does not come back.

        Steps, interventions and every count stay. Errors keep their kind: the message of an exception can quote text.
        """
        if _DEGREES.index(content) <= _DEGREES.index(self.log_content):
            return self
        receipt = self.receipt.model_copy(update={"errors": [_kind(error) for error in self.receipt.errors]})
        update: dict[str, Any] = {"log_content": content, "request": "", "receipt": receipt}
        if content == "none":
            receipt.interventions = [i.model_copy(update={"cue_ids": []}) for i in receipt.interventions]
            lengths = Lengths(prompt=self.prompt_tokens, output=self.output_tokens, replaced=self.replaced_tokens)
            update |= {"prompt_ids": [], "output_ids": [], "lengths": lengths}
        return self.model_copy(update=update)


_DEGREES: tuple[LogContent, ...] = ("full", "ids", "none")


def _kind(error: str) -> str:
    """`detector: ValueError: ...` without its message, and any number (it may be a token id) as `#`."""
    return re.sub(r"\d+", "#", ": ".join(error.split(": ")[:2]))


class Spool:
    """Appends traces to `spool-<UTC date>-<pid>.jsonl` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Trace directory {directory} cannot be made", got=error.strerror) from error

    def append(self, trace: Trace) -> None:
        """Writes one line with a single `write`; OSError when the disk is full or read-only."""
        line = trace.model_dump_json().encode() + b"\n"
        name = f"spool-{time.strftime('%Y%m%d', time.gmtime())}-{os.getpid()}.jsonl"
        handle = os.open(self._directory / name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if _is_torn(handle):
                line = b"\n" + line
            written = os.write(handle, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of a trace were written")
        finally:
            os.close(handle)


def _is_torn(handle: int) -> bool:
    """Whether the file ends inside a line: a full disk, or a killed process that had the same id."""
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


class ReadReport(BaseModel):
    """How reading a trace directory went."""

    files: int = 0
    traces: int = 0
    malformed: int = 0
    superseded: int = 0
    """Lines replaced by a later line with the same guard id (a preempted request is written again)."""


def read_traces(directory: Path) -> tuple[list[Trace], ReadReport]:
    """All traces of a directory in the order they were first written, damage counted and skipped."""
    if not directory.is_dir():
        raise UserError(
            f"Trace directory {directory} does not exist", fix="Point --traces at the directory that `serve` writes"
        )
    report = ReadReport()
    found: dict[str, Trace] = {}
    for path in sorted(directory.glob("spool-*.jsonl")):
        report.files += 1
        for trace in _lines(path, report):
            if trace.guard_id in found:
                report.superseded += 1
            found[trace.guard_id] = trace
    report.traces = len(found)
    return list(found.values()), report


def _lines(path: Path, report: ReadReport) -> Iterator[Trace]:
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                yield Trace.model_validate_json(line)
            except (ValidationError, ValueError):
                report.malformed += 1


def summary(trace: Trace) -> dict[str, Any]:
    """One trace as the row that `traces ls` prints."""
    return {
        "guard_id": trace.guard_id,
        "request": trace.request,
        "tokens": trace.output_tokens,
        "steps": trace.receipt.seen,
        "cues": trace.cues,
        "interventions": len(trace.receipt.interventions),
        "clean": trace.receipt.clean,
    }
