"""Labelling in the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from classifiers.cli import app
from classifiers.corpus import read_corpus
from classifiers.detector import Asked
from classifiers.review import SAMPLED, Reviewed, _spans, doubt, doubtful, from_rows, from_spool, parse_spans, review
from guard.traces import Intervention, Receipt, Spool, StepRecord, Trace
from tests.classifiers.conftest import CUES, SAFE
from tests.guard import kit

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


CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
TRIGGER = list(kit.runtime().triggers[0].spaced)


def recorded(guard_id: str, policy: str = "default", *, substituted: bool) -> Trace:
    """A calm step, a cue that was answered, a calm step: the trigger behind the cue, or in its place."""
    kept = [] if substituted else CUE
    runs = [(CALM, False, False), (kept, True, False), (TRIGGER, False, True), (CALM, False, False)]
    output: list[int] = []
    steps: list[StepRecord] = []
    for ids, cue, injected in runs:
        if ids:
            steps.append(StepRecord(len(output), len(output) + len(ids), "reasoning", None, cue, injected))
        output += ids
    answer = Intervention(
        step=1, at=len(CALM) + len(kept), trigger_id="wait-harm", mode="substitute" if substituted else "inject",
        cue_ids=CUE if substituted else [], score=0.9,
    )  # fmt: skip
    return Trace(
        guard_id=guard_id, created=1.0, model="kit", tokenizer_hash=kit.runtime().tokenizer_hash, request="How?",
        prompt_ids=[], output_ids=output, steps=steps,
        receipt=Receipt(
            guard_id=guard_id, policy=policy, policy_hash="h", detector="d", engine="e", interventions=[answer]
        ),
    )  # fmt: skip


def kit_model(tmp_path: Path) -> str:
    """The directory of a model with the kit's tokenizer."""
    path = tmp_path / "kit"
    path.mkdir()
    (path / "config.json").write_text("{}")
    kit.tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return kit_model(tmp_path)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Traces of both modes, and a probe."""
    for trace in (
        recorded("injected", substituted=False),
        recorded("replaced", substituted=True),
        recorded("proof", "probe", substituted=False),
    ):
        Spool(tmp_path / "traces").append(trace)
    return tmp_path / "traces"


def test_traces_are_read_as_the_model_wrote_them(spool: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triggers and probes are left out, a cue that a trigger took the place of is back; the tokenizer is read once."""
    from guard.sidecar import model as models

    read, find = list[str](), models.find_model
    monkeypatch.setattr(models, "find_model", lambda asked: read.append(asked) or find(asked))
    steps = (kit.CALM, kit.CUE, kit.CALM)
    assert from_spool(spool, model) == [Reviewed("injected", "How?", steps), Reviewed("replaced", "How?", steps)]
    assert read == [model]


def test_steps_of_the_answer_stay_the_answers(tmp_path: Path, model: str, tiny: Path) -> None:
    """From the trace into the line that `label` writes, and from there into what is measured."""
    trace = recorded("zones", substituted=True)
    steps = [*trace.steps[:2], replace(trace.steps[2], zone="answer")]
    Spool(tmp_path / "traces").append(trace.model_copy(update={"steps": steps}))
    rows = from_spool(tmp_path / "traces", model)
    assert rows == [Reviewed("zones", "How?", (kit.CALM, kit.CUE, kit.CALM), frozenset({2}))]
    out = tmp_path / "mine.jsonl"
    review(rows, out, tiny, 1, screen(), answers("h", "1", ""))
    (own,) = [each for each in read_corpus(own=[out], authored=False).traces if each.source == "own"]
    assert own.answer == frozenset({2})


def test_label_asks_about_traces(spool: Path, model: str, tiny: Path, tmp_path: Path) -> None:
    asked = ["label", "--traces", spool, "--model", model, "--detector", tiny, "--out", tmp_path / "mine.jsonl"]
    result = CliRunner().invoke(app, [str(arg) for arg in asked], input="h\n1\n\nh\n1\n\n")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"injected", "replaced"}
    assert {str(line["steps"]) for line in lines} == {
        str([[kit.CALM, "neutral"], [kit.CUE, "cue"], [kit.CALM, "neutral"]])
    }


def test_of_many_traces_a_sample_is_scored() -> None:
    class Counting(kit.WordDetector):
        scored = 0

        def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
            self.scored += 1
            return np.array([float(asked[0].step)], np.float32)

    rows = [Reviewed(str(i), "r", (str(i / 1000),)) for i in range(1000)]
    detector = Counting()
    found = doubtful(rows, detector, 3)
    assert detector.scored == 3 * SAMPLED
    distances = [abs(scores[0] - 0.5) for _, scores in found]
    assert len(found) == 3
    assert distances == sorted(distances)
    assert found == doubtful(rows, detector, 3)
    assert len(doubtful(rows[:2], detector, 3)) == 2
