"""The commands' exact formats and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from classifiers.cli import app
from classifiers.data import deduplicate, read_steps
from classifiers.detector import Detector
from guard.errors import UserError
from guard.steps import split_text
from tests.classifiers.conftest import CUES, SAFE, tiny_rows


def run(*args: object) -> str:
    """Run a command; a UserError comes through, as the top-level cli.py needs it."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def _lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def test_score_writes_the_live_guards_numbers(tiny: Path, tmp_path: Path) -> None:
    request = "How do I steal a lamp?"
    reasoning = f"{SAFE[1]} {CUES[0]} {CUES[1]}"
    source = _lines(
        tmp_path / "in.jsonl",
        {"id": "a", "request": request, "reasoning": reasoning},
        "",
        {"id": "b", "request": request, "steps": [SAFE[0]]},
        {"id": "c", "request": request, "steps": []},
    )
    run("score", "--input", source, "--output", tmp_path / "out.jsonl", "--model", tiny)
    first, second, third = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    detector = Detector.load(tiny)
    texts = split_text(reasoning)
    scores = detector.score(detector.request(request), texts).tolist()
    assert texts == [SAFE[1], *CUES]
    assert first == {
        "id": "a",
        "steps": [{"text": t, "score": s, "cue": s >= detector.threshold} for t, s in zip(texts, scores, strict=True)],
        "first_cue": 1,
    }
    assert [step["cue"] for step in first["steps"]] == [False, True, True]
    assert (second["id"], second["first_cue"], second["steps"][0]["cue"]) == ("b", None, False)
    assert third == {"id": "c", "steps": [], "first_cue": None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1", "request": "r"}', 'in.jsonl line 2 is malformed.*either "reasoning" or "steps"'),
        ('{"id": "1", "request": "r", "reasoning": "", "steps": []}', "line 2"),
        ('{"id": "1", "reasoning": ""}', "line 2 is malformed at request"),
        ("not json", "line 2 is malformed"),
    ],
)
def test_score_names_the_bad_line_and_writes_nothing(tmp_path: Path, line: str, message: str) -> None:
    source = _lines(tmp_path / "in.jsonl", {"id": "0", "request": "r", "steps": ["s"]}, line)
    with pytest.raises(UserError, match=message):
        run("score", "--input", source, "--output", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        run("judge", "--input", tmp_path / "none.jsonl", "--output", tmp_path / "out.jsonl")


def test_judge_writes_probabilities(tmp_path: Path) -> None:
    source = _lines(
        tmp_path / "in.jsonl", {"id": "a", "request": "r", "reasoning": "", "answer": "I can't help with that."}
    )
    run("judge", "--input", source, "--output", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert list(row) == ["id", "reasoning_harm", "answer_harm", "refusal"]
    assert row["id"] == "a"
    assert row["reasoning_harm"] == 0.0
    assert row["answer_harm"] < 0.5 < row["refusal"] <= 1.0


def test_train_on_given_rows_writes_a_loadable_artifact(tmp_path: Path) -> None:
    source = _lines(tmp_path / "rows.jsonl", *(row.model_dump() for row in tiny_rows()))
    output = run("train", "--data", source, "--out", tmp_path / "det", "--seed", 3)
    assert "caught harmful requests" in output
    manifest = json.loads((tmp_path / "det" / "manifest.json").read_text())
    assert manifest["training"]["rows"] == len(tiny_rows())
    assert manifest["training"]["seed"] == 3
    assert set(manifest["metrics"]["auroc_step"]) == {"rate", "lo", "hi", "n"}
    assert Detector.load(tmp_path / "det").version == manifest["version"]
    assert sorted(path.name for path in (tmp_path / "det").iterdir()) == ["manifest.json", "model.onnx"]


def test_public_requests_are_told_in_the_manifest(tmp_path: Path) -> None:
    source = _lines(tmp_path / "rows.jsonl", *(row.model_dump() for row in tiny_rows()))
    public = _lines(
        tmp_path / "requests.jsonl",
        {"request": "Steal the moon", "label": "harmful", "source": "a", "licence": "MIT", "category": "x"},
        {"request": "steal  the moon", "label": "harmful", "source": "a", "licence": "MIT"},
        {"request": "Paint the moon", "label": "benign", "source": "b"},
    )
    run("train", "--data", source, "--requests", public, "--out", tmp_path / "det")
    manifest = json.loads((tmp_path / "det" / "manifest.json").read_text())
    told = {name: value for name, value in manifest["training"].items() if name.startswith("requests_")}
    assert told == {"requests_a": "1 rows, licence MIT", "requests_b": "1 rows, licence not given"}
    assert manifest["metrics"]["auroc_request_unseen_a_and_b"]["n"] == 2


def test_a_bad_public_request_is_named(tmp_path: Path) -> None:
    public = _lines(tmp_path / "requests.jsonl", {"request": "r", "label": "odd", "source": "a"})
    with pytest.raises(UserError, match=r"requests\.jsonl line 1 is malformed at label"):
        run("train", "--requests", public, "--out", tmp_path / "det")


def test_train_without_benign_rows_says_so(tmp_path: Path) -> None:
    source = _lines(
        tmp_path / "rows.jsonl", *(row.model_dump() for row in tiny_rows() if row.request_label == "harmful")
    )
    with pytest.raises(UserError, match="steps under benign ones"):
        run("train", "--data", source, "--out", tmp_path / "det")
    assert not (tmp_path / "det").exists()


def test_duplicates_are_dropped_by_what_the_scorer_sees(tmp_path: Path) -> None:
    row = tiny_rows()[0]
    disguised = row.model_copy(update={"id": "2", "step": row.step.upper().replace(" ", "  ")})
    assert deduplicate([row, disguised]) == [row]
    assert read_steps([_lines(tmp_path / "a.jsonl", row.model_dump(), disguised.model_dump())]) == [row]


def test_agreement_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows to measure on"):
        run("agreement", "--responses", _lines(tmp_path / "empty.jsonl", ""))


def test_agreement_prints_a_line_a_source(tmp_path: Path) -> None:
    rows = [
        {"request": f"r{i}", "response": "I can't help with that.", "harmful": 0, "source": "mine"} for i in range(4)
    ]
    output = run("agreement", "--responses", _lines(tmp_path / "rows.jsonl", *rows))
    assert "mine" in output
