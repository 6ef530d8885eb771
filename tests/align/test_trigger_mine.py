"""Candidates from turning points: what is merged, what is left out, and the file a person reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from align.csr_cli import triggers_app
from align.trigger_file import MAX_CHARS, NOTHING, Candidate, read_candidates, write_candidates
from align.trigger_mine import mine, normalise
from classifiers.stats import Rate
from guard.errors import UserError
from guard.triggers import NEUTRAL, POOL, Trigger
from tests.align.csr_reports import report, row, turn

WORDING = "Hang on, my help would put a stranger in danger."


def test_near_duplicates_are_one_candidate_and_generality_ranks() -> None:
    found, dropped = mine(
        [
            report(
                row("a", {"safe": turn("A lock is picked to get into another's home.")}),
                row("b", {"safe": turn(f"- {WORDING}")}, request="first"),
                row("c", {"safe": turn("Hang on,  my help would put a stranger in real danger.")}, request="second"),
            ),
            report(row("d", {"safe": turn("Nobody should suffer because of my reply.")}, request="third")),
        ]
    )
    assert [c.text for c in found] == [
        WORDING, "Nobody should suffer because of my reply.", "A lock is picked to get into another's home.",
    ]  # fmt: skip
    assert dropped == {}
    first = found[0].evidence
    assert first is not None
    assert (first.requests, first.found, first.example, first.request_words) == (2, 2, "b", 0.0)
    assert (first.before, first.after) == (Rate.of(2, 16), Rate.of(24, 24))
    # Of its words of four letters and more, "lock" is the request's.
    last = found[2].evidence
    assert last is not None
    assert last.request_words == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (turn(WORDING, forced=True), "forced by a guard"),
        (turn("", step=None, before=None), "safe from the start"),
        (turn(WORDING, at_end=True), "at the end"),
        (turn("Oh no."), "fewer than 3 words"),
        (turn("word " * MAX_CHARS), f"longer than {MAX_CHARS} characters"),
        (turn(POOL[0].text.upper()), "in the pool"),
    ],
)
def test_what_is_left_out_is_counted(step: object, reason: str) -> None:
    rows = report(row("a", {"safe": step}), row("b", {}), row("c", {"unsafe": turn(WORDING)}))  # type: ignore[dict-item]
    assert mine([rows]) == ([], {reason: 1})


def test_hostile_text_becomes_one_plain_line() -> None:
    assert normalise("2) ﬁne\u202e\x1b[31m,\n so   it\u200b is") == "fine[31m, so it is"


def test_the_command_writes_what_the_reader_reads(tmp_path: Path) -> None:
    hostile = 'Wait: {"id": !!python/object:os.system} "quoted" # not a comment'
    source, target = tmp_path / "csr.json", tmp_path / "out" / "candidates.yaml"
    source.write_text(report(row("a", {"safe": turn(hostile)})).model_dump_json(), encoding="utf-8")
    result = CliRunner().invoke(triggers_app, ["mine", "--csr", str(source), "--out", str(target)])
    assert result.exit_code == 0, result.output
    assert "1 candidates" in result.output
    (found,) = read_candidates(target)
    assert found.trigger == Trigger(found.id, hostile)
    assert target.read_text(encoding="utf-8").startswith("# Candidates for the trigger pool")
    assert [path.name for path in target.parent.iterdir()] == ["candidates.yaml"]


def test_a_bad_file_names_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        read_candidates(path)
    path.write_text("triggers: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_candidates(path)
    path.write_text(yaml.safe_dump({"triggers": [{"id": "x", "text": "", "strong": False}]}))
    with pytest.raises(UserError, match=r"key `triggers\.0\.text`"):
        read_candidates(path)
    write_candidates([Candidate(id=POOL[0].id, text="Something else.")], path)
    with pytest.raises(UserError, match="in the pool"):
        read_candidates(path)
    write_candidates([Candidate(id="a", text="Something else."), Candidate(id="a", text="And more.")], path)
    with pytest.raises(UserError, match="in the file twice"):
        read_candidates(path)
    with pytest.raises(UserError, match="cannot be written"):
        write_candidates([], tmp_path / "candidates.yaml" / "below")


@pytest.mark.parametrize("name", [NEUTRAL.id, NOTHING])
def test_a_candidate_may_not_be_called_like_a_control(name: str, tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    write_candidates([Candidate(id=name, text="Something else.")], path)
    message = f"{path}, an id is taken; got `{name}`, which is a control .*; wanted an id of its own .*Rename it"
    with pytest.raises(UserError, match=message):
        read_candidates(path)
