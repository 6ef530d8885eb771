"""Labelling in the terminal: the traces that the detector doubts most come first (active learning).

Reasoning is hostile text: it is shown without control characters and never read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from classifiers.data import read_rows
from classifiers.detector import Detector
from classifiers.labels import AUTHORED_EXAMPLE, AuthoredTrace, Kind, Label
from classifiers.offline import ScoreRow
from guard.cli import decoder, harmless
from guard.errors import UserError
from guard.steps import split_text
from guard.traces import read_traces

KINDS: dict[str, Kind] = {"h": "harmful", "b": "benign", "a": "alarming"}
_SPANS = re.compile(r"^(?:-|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)?$")
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Reviewed:
    """One reasoning to label."""

    id: str
    request: str
    steps: tuple[str, ...]


def from_spool(directory: Path, model: str | None) -> list[Reviewed]:
    """The reasonings of a trace directory, injected triggers left out. UserError when they cannot be decoded, or when
    the policy kept no requests."""
    all_of_them, _ = read_traces(directory)
    traces = [trace for trace in all_of_them if trace.log_content == "full"]
    if all_of_them and not traces:
        raise UserError(
            f"No trace in {directory} holds its request", got="log_content: " + all_of_them[0].log_content,
            wanted="traces of a policy with `log_content: full`",
        )  # fmt: skip
    found = []
    for trace in traces:
        decode = decoder(trace, model)
        if decode is None:
            raise UserError(f"trace {trace.guard_id} cannot be decoded", fix="Give --model: its tokenizer is needed")
        texts = [decode(trace.output_ids[s.start : s.end]).strip() for s in trace.steps if not s.injected]
        found.append(Reviewed(trace.guard_id, trace.request, tuple(text for text in texts if text)))
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
    rows: Iterable[Reviewed], out: Path, detector: Path | None, limit: int, console: Console, ask: Ask | None = None
) -> int:
    """Ask about at most `limit` traces that `out` does not hold yet, append each answer at once, return how many."""
    loaded = Detector.load(detector)
    known = {row.id for row in read_rows(out, AuthoredTrace, AUTHORED_EXAMPLE)} if out.exists() else set()
    open_rows = [row for row in rows if row.id not in known and row.steps]
    scored = [(row, loaded.score(loaded.request(row.request), row.steps).tolist()) for row in open_rows]
    scored.sort(key=lambda item: doubt(item[1], loaded.threshold))
    done = 0
    for row, scores in scored[:limit]:
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
        steps=list(zip(row.steps, labels, strict=True)),
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
