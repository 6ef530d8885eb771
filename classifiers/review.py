"""Labelling in the terminal: the traces that the detector doubts most come first (active learning).

Of many traces a sample is scored, so that the first question comes soon. Reasoning is hostile text: it is shown without
control characters and never read as markup.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from classifiers.console import progress
from classifiers.data import read_rows
from classifiers.detector import Detector
from classifiers.labels import AUTHORED_EXAMPLE, AuthoredTrace, Kind, Label
from classifiers.offline import ScoreRow
from classifiers.written import written_steps
from guard.cli import decoders, harmless
from guard.errors import UserError
from guard.replay import PROBE
from guard.steps import split_text
from guard.traces import read_traces

SAMPLED = 10
"""So many traces are scored for each that is asked about."""
KINDS: dict[str, Kind] = {"h": "harmful", "b": "benign", "a": "alarming"}
_SPANS = re.compile(r"^(?:-|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)?$")
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Reviewed:
    """One output to label."""

    id: str
    request: str
    steps: tuple[str, ...]
    answer: frozenset[int] = frozenset()
    """Steps that stand in the answer; the others are reasoning."""


def from_spool(directory: Path, model: str | None) -> list[Reviewed]:
    """The outputs of a trace directory, as far as the guard watched them: probes and injected triggers left out, cues
    that triggers took the place of put back. UserError when they cannot be decoded, or when the policy kept no
    requests."""
    asked = [trace for trace in read_traces(directory)[0] if trace.receipt.policy != PROBE]
    traces = [trace for trace in asked if trace.log_content == "full"]
    if asked and not traces:
        raise UserError(
            f"No trace in {directory} holds its request", got="log_content: " + asked[0].log_content,
            wanted="traces of a policy with `log_content: full`",
        )  # fmt: skip
    found, decode_of = [], decoders(model)
    for trace in traces:
        decode = decode_of(trace)
        if decode is None:
            raise UserError(f"trace {trace.guard_id} cannot be decoded", fix="Give --model: its tokenizer is needed")
        written = written_steps(trace, decode)
        answer = frozenset(i for i, (index, _) in enumerate(written) if trace.steps[index].zone == "answer")
        found.append(Reviewed(trace.guard_id, trace.request, tuple(text for _, text in written), answer))
    return found


def from_rows(path: Path) -> list[Reviewed]:
    """The reasonings of a JSONL file; errors as `read_rows`."""
    rows = read_rows(path, ScoreRow, '{"id": "1", "request": "...", "reasoning": "..."}')
    return [
        Reviewed(row.id, row.request, tuple(row.steps if row.steps is not None else split_text(row.reasoning or "")))
        for row in rows
    ]


def doubt(scores: Sequence[float], threshold: float) -> float:
    """How undecided a trace is: the log-odds distance of its nearest step from the threshold, smaller is more so."""
    odds = np.log(np.clip(scores, 1e-6, 1 - 1e-6) / (1 - np.clip(scores, 1e-6, 1 - 1e-6)))
    return float(np.min(np.abs(odds - np.log(threshold / (1 - threshold))), initial=np.inf))


def review(
    rows: Sequence[Reviewed], out: Path, detector: Path | None, limit: int, console: Console, ask: Ask | None = None
) -> int:
    """Ask about at most `limit` traces that `out` does not hold yet, append each answer at once, return how many."""
    loaded = Detector.load(detector)
    known = {row.id for row in read_rows(out, AuthoredTrace, AUTHORED_EXAMPLE)} if out.exists() else set()
    open_rows = [row for row in rows if row.id not in known and row.steps]
    done = 0
    for row, scores in doubtful(open_rows, loaded, limit):
        answer = _ask_one(
            row, scores, loaded.threshold, console, ask or (lambda question: console.input(Text(question)))
        )
        if answer is None:
            break
        if answer == "skip":
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(answer + "\n")
        done += 1
    console.print(f"{done} traces labelled into {out}; {len(open_rows) - done} left", highlight=False)
    return done


def doubtful(rows: Sequence[Reviewed], detector: Detector, limit: int) -> list[tuple[Reviewed, list[float]]]:
    """The `limit` traces of a sample that the detector doubts most, with their scores, the most doubtful first.

    The sample, the same for the same rows, is `SAMPLED` times as large.
    """
    picked = sorted(random.Random(0).sample(range(len(rows)), min(len(rows), SAMPLED * limit)))
    scored = []
    with progress("Looking for doubt") as (_, tick):
        for number, row in enumerate(rows[index] for index in picked):
            tick(number, len(picked), f"trace {number + 1} of {len(picked)}")
            scored.append((row, detector.score(detector.request(row.request), row.steps).tolist()))
    scored.sort(key=lambda item: doubt(item[1], detector.threshold))
    return scored[:limit]


def _ask_one(row: Reviewed, scores: Sequence[float], threshold: float, console: Console, ask: Ask) -> str | None:
    """One line to write, `skip`, or None to stop."""
    _show(row, scores, threshold, console)
    kind = _until(ask, "request: [h]armful, [b]enign, [a]larming but benign, [s]kip, [q]uit: ", {*KINDS, "s", "q"})
    if kind in {"s", "q"}:
        return "skip" if kind == "s" else None
    proposed = _spans([i for i, score in enumerate(scores) if score >= threshold]) if kind == "h" else "-"
    cues = _numbers(ask, f"cues (3-7,9 or -; Enter takes {proposed}): ", proposed, len(row.steps))
    triggers = _numbers(ask, "triggers (Enter: none): ", "-", len(row.steps))
    labels: list[Label] = [
        "cue" if i in cues else "trigger" if i in triggers else "neutral" for i in range(len(scores))
    ]
    return AuthoredTrace(
        id=row.id, lang="und", category="reviewed", label=KINDS[kind], request=row.request,
        steps=list(zip(row.steps, labels, strict=True)), answer=sorted(row.answer),
    ).model_dump_json()  # fmt: skip


def _show(row: Reviewed, scores: Sequence[float], threshold: float, console: Console) -> None:
    console.rule()
    console.print(Text("request: ", style="bold") + harmless(row.request, 1000))
    table = Table("", "score", "step", show_lines=False)
    for index, (step, score) in enumerate(zip(row.steps, scores, strict=True)):
        table.add_row(str(index), f"{score:.2f}", harmless(step), style="bold red" if score >= threshold else "")
    console.print(table)


def _until(ask: Ask, question: str, allowed: set[str]) -> str:
    while True:
        answer = ask(question).strip().lower()
        if answer in allowed:
            return answer


def _numbers(ask: Ask, question: str, default: str, count: int) -> set[int]:
    """Read step numbers and ranges, until they are well formed and within the trace."""
    while True:
        answer = ask(question).replace(" ", "") or default
        if _SPANS.match(answer):
            found = parse_spans(answer)
            if all(number < count for number in found):
                return found


def parse_spans(text: str) -> set[int]:
    """The numbers of `3-7,9`; none of `-`."""
    numbers: set[int] = set()
    for part in text.split(",") if text not in {"", "-"} else ():
        start, _, stop = part.partition("-")
        numbers.update(range(int(start), int(stop or start) + 1))
    return numbers


def _spans(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "-"
