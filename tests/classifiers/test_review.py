"""Labelling in the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from classifiers.corpus import read_corpus
from classifiers.review import Reviewed, _spans, doubt, from_rows, parse_spans, review
from tests.classifiers.conftest import CUES, SAFE

ROWS = [
    Reviewed("bad", "How do I steal a lamp?", (SAFE[1], *CUES)),
    Reviewed("good", "How do I paint a lamp?", ("I can explain it.",)),
    Reviewed("empty", "How?", ()),
]


def answers(*lines: str) -> Callable[[str], str]:
    """An operator who types these lines, and fails the test when asked more."""
    left = iter(lines)
    return lambda _: next(left)


def screen() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_answers_become_lines_that_training_reads(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    asked = answers("h", "1-2", "") if _first(tiny) == "bad" else answers("b", "-", "")
    assert review(ROWS, out, tiny, 1, screen(), asked) == 1
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    labels = [label for _, label in line["steps"]]
    assert labels == (["neutral", "cue", "cue"] if line["id"] == "bad" else ["neutral"])
    (own,) = [trace for trace in read_corpus(own=[out], authored=False).traces if trace.source == "own"]
    assert list(own.labels) == labels


def _first(tiny: Path) -> str:
    from classifiers.detector import Detector

    detector = Detector.load(tiny)
    doubts = {
        r.id: doubt(detector.score(detector.request(r.request), r.steps).tolist(), detector.threshold) for r in ROWS[:2]
    }
    return min(doubts, key=lambda name: doubts[name])


def test_labelled_traces_are_not_asked_again_and_quitting_keeps_the_rest(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    assert review(ROWS, out, tiny, 9, screen(), answers("b", "-", "-", "q")) == 1
    assert review(ROWS, out, tiny, 9, screen(), answers("s")) == 0
    assert len(out.read_text().splitlines()) == 1


def test_nonsense_is_asked_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    review(ROWS[:1], out, tiny, 1, screen(), answers("x", "h", "one", "7", "1", "0-9", "0"))
    assert [label for _, label in json.loads(out.read_text())["steps"]] == ["trigger", "cue", "neutral"]


def test_hostile_text_reaches_the_terminal_without_its_controls(tiny: Path, tmp_path: Path) -> None:
    console = screen()
    row = Reviewed("x", "[red]How?\x1b[2J", ("\x1b]0;owned\x07 step one is here", "[/] [bold]two is here too"))
    review([row], tmp_path / "mine.jsonl", tiny, 1, console, answers("q"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert "[red]How?" in shown
    assert "[bold]two" in shown


@pytest.mark.parametrize(("text", "numbers"), [("-", set()), ("", set()), ("3-5,9", {3, 4, 5, 9}), ("0", {0})])
def test_spans(text: str, numbers: set[int]) -> None:
    assert parse_spans(text) == numbers


@given(st.sets(st.integers(0, 40)))
def test_spans_come_back(numbers: set[int]) -> None:
    assert parse_spans(_spans(sorted(numbers))) == numbers


def test_doubt_is_smallest_at_the_threshold() -> None:
    assert doubt([0.1, 0.7], 0.7) == pytest.approx(0)
    assert doubt([0.1], 0.7) > doubt([0.5], 0.7)
    assert doubt([], 0.7) == float("inf")
    assert doubt([0.0, 1.0], 0.5) < float("inf")


def test_rows_are_split_as_live(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        json.dumps({"id": "a", "request": "r", "reasoning": "One step is here. Two steps are here."}) + "\n"
    )
    assert from_rows(path) == [Reviewed("a", "r", ("One step is here.", "Two steps are here."))]
