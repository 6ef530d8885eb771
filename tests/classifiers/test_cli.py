"""The commands' exact formats and their errors."""

from __future__ import annotations

import codecs
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from classifiers.artifact import fingerprint
from classifiers.cli import app
from classifiers.corpus import Corpus, part_of_request, read_corpus
from classifiers.detector import Detector
from classifiers.evaluate import NO_ANSWERS, Evaluation
from classifiers.network import StepNetwork
from classifiers.perturb import ATTACKS
from classifiers.sources import SOURCES
from classifiers.stats import Rate
from classifiers.train_cli import save_checkpoint, settle
from classifiers.tune import TuneConfig
from guard.errors import UserError
from guard.steps import split_text
from guard.traces import Spool
from tests.classifiers.conftest import CUES, SAFE, tiny_traces
from tests.classifiers.test_review import kit_model, recorded


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
        {"id": "d", "request": "How do I paint a lamp?", "steps": [codecs.encode(CUES[0], "rot13")]},
    )
    run("score", "--input", source, "--output", tmp_path / "out.jsonl", "--model", tiny)
    first, second, third, fourth = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    detector = Detector.load(tiny)
    texts = split_text(reasoning)
    scores = detector.score(detector.request(request), texts).tolist()
    assert texts == [SAFE[1], *CUES]
    assert first == {
        "id": "a",
        "steps": [
            {"text": t, "score": s, "unreadable": False, "cue": s >= detector.threshold}
            for t, s in zip(texts, scores, strict=True)
        ],
        "first_cue": 1,
    }
    assert [step["cue"] for step in first["steps"]] == [False, True, True]
    assert (second["id"], second["first_cue"], second["steps"][0]["cue"]) == ("b", None, False)
    assert third == {"id": "c", "steps": [], "first_cue": None}
    (hidden,) = fourth["steps"]
    assert hidden["score"] < detector.threshold
    assert (hidden["unreadable"], hidden["cue"], fourth["first_cue"]) == (True, True, 0)


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


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny traces as an operator's reviewed lines."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    rows = [
        {
            "id": trace.id, "lang": trace.language, "category": "", "label": trace.kind, "request": trace.request,
            "steps": list(zip(trace.steps, trace.labels, strict=True)),
        }
        for trace in tiny_traces()
    ]  # fmt: skip
    return _lines(path, *rows)


@pytest.fixture
def alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny detector is the shipped one, and no authored traces ship."""
    monkeypatch.setattr("classifiers.gate.DEFAULT", tiny)
    monkeypatch.setattr("classifiers.corpus.read_authored", list)


def deaf(tiny: Path, out: Path) -> Path:
    """A copy of the tiny detector with a threshold that no score reaches."""
    shutil.copytree(tiny, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"threshold": 2.0}))
    return out


def train(out: Path, own: Path, tiny: Path, *more: object) -> Result:
    """One retraining of the heads on the tiny encoder."""
    asked = [
        "train",
        "--data",
        own,
        "--from",
        tiny,
        "--no-authored",
        "--out",
        out,
        "--head-epochs",
        200,
        "--head-lr",
        5e-3,
        *more,
    ]
    return CliRunner().invoke(app, [str(arg) for arg in asked])


@pytest.mark.usefixtures("alone")
def test_retraining_replaces_an_artifact_that_is_no_better(tiny: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "detector"
    shutil.copytree(tiny, out)
    (out / "somebody-elses.onnx").write_bytes(b"keep me")
    result = train(out, own, tiny, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert (out / "somebody-elses.onnx").read_bytes() == b"keep me"
    assert "recall complying traces" in result.output
    counts = read_corpus(own=[own], authored=False).own
    assert (
        f"80 own traces, parted by their requests: {counts['train']} are trained on, {counts['val']} validated on, "
        f"{counts['test']} measured on"
    ) in " ".join(result.output.split())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["training"]["how"] == f"heads alone, encoder of {tiny.name}"
    assert manifest["training"]["seed"] == 3
    assert Detector.load(out).version == manifest["version"]
    # The heads may be the ones it began with, where none better were found; what they were trained on is new.
    assert manifest["training_data"] != Detector.load(tiny).manifest.training_data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector"]


@pytest.mark.usefixtures("alone")
def test_a_worse_artifact_is_refused_and_kept_aside(tiny: Path, own: Path, tmp_path: Path) -> None:
    """Labels turned round: cues are called neutral and the other way about."""
    out = tmp_path / "detector"
    shutil.copytree(tiny, out)
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    for line in lines:
        if part_of_request(line["request"]) != "test" and line["label"] == "harmful":
            line["steps"] = [[text, "neutral" if label == "cue" else "cue"] for text, label in line["steps"]]
    result = train(out, _lines(tmp_path / "bad.jsonl", *lines), tiny)
    assert result.exit_code == 3, result.output
    assert "worse" in result.output
    assert Detector.load(out).version == Detector.load(tiny).version
    assert Detector.load(tmp_path / "detector.refused").version != Detector.load(tiny).version
    compared = CliRunner().invoke(app, ["compare", str(out), str(tmp_path / "detector.refused"), "--data", str(own)])
    assert compared.exit_code == 3
    forced = train(out, tmp_path / "bad.jsonl", tiny, "--force")
    assert forced.exit_code == 0
    assert Detector.load(out).version != Detector.load(tiny).version


@pytest.mark.usefixtures("alone")
def test_a_place_that_was_lost_already_is_no_excuse(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no worse than the artifact in its place must be no worse than the shipped one either."""
    out, candidate = deaf(tiny, tmp_path / "detector"), deaf(tiny, tmp_path / "detector.candidate")
    with pytest.raises(typer.Exit) as stopped:
        settle(candidate, out, Corpus(tiny_traces()), force=False)
    assert stopped.value.exit_code == 3
    said = capsys.readouterr().err
    assert "recall complying traces 1.000 -> 0.000, 100.0 points worse, allowed 2.0, more than chance explains" in said
    assert f"(against {tiny})" in said
    assert "--force" in said
    candidate = deaf(tiny, tmp_path / "detector.candidate")
    settle(candidate, out, Corpus(tiny_traces()), force=True)
    assert not candidate.exists()
    # The other way about: what is better than the one in its place and as good as the shipped one.
    shutil.copytree(tiny, candidate)
    settle(candidate, out, Corpus(tiny_traces()), force=False)
    assert fingerprint(out) == fingerprint(tiny)


@pytest.mark.usefixtures("alone")
def test_export_replaces_no_detector_by_a_worse_one(
    tiny: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifiers.network.base_directory", lambda _: tiny_base)
    monkeypatch.setattr("classifiers.corpus.read_authored", tiny_traces)
    monkeypatch.setattr("classifiers.corpus.demo_traces", list)
    torch.manual_seed(0)
    untrained = StepNetwork(tiny_base, TuneConfig().frozen_layers)
    save_checkpoint(untrained, tmp_path / "net.safetensors")
    asked = ["export", str(tmp_path / "net.safetensors"), "--out"]
    first = CliRunner().invoke(app, [*asked, str(tmp_path / "new")])
    assert first.exit_code == 0, first.output
    assert "int8 against float32" in first.output
    assert Detector.load(tmp_path / "new").manifest.training["how"] == "exported from net.safetensors"
    out = tmp_path / "detector"
    shutil.copytree(tiny, out)
    refused = CliRunner().invoke(app, [*asked, str(out)])
    assert refused.exit_code == 3, refused.output
    assert fingerprint(out) == fingerprint(tiny)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["detector", "detector.refused", "new"]
    forced = CliRunner().invoke(app, [*asked, str(out), "--force"])
    assert forced.exit_code == 0, forced.output
    assert fingerprint(out) != fingerprint(tiny)


@pytest.mark.usefixtures("alone")
def test_tuning_says_which_epoch_was_kept_and_its_checkpoint_can_be_exported(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifiers.network.base_directory", lambda _: tiny_base)
    monkeypatch.setattr("classifiers.corpus.read_authored", tiny_traces)
    monkeypatch.setattr("classifiers.corpus.demo_traces", list)
    texts, out, kept = _lines(tmp_path / "none.jsonl", ""), tmp_path / "new", tmp_path / "net.safetensors"
    asked = ["train", "--tune", "--texts", texts, "--epochs", 3, "--patience", 1, "--checkpoint", kept, "--out", out]
    result = CliRunner().invoke(app, [str(arg) for arg in [*asked, "--force"]])
    assert result.exit_code == 0, result.output
    training = json.loads((out / "manifest.json").read_text())["training"]
    ran, best = training["epochs_ran"], training["epoch_kept"]
    assert 1 <= best <= ran <= 3
    why = "all epochs ran" if ran - best < 1 else "validation below its best for 1 epochs"
    assert training["how"] == f"encoder fine-tuned for {ran} epochs of at most 3, epoch {best} kept: {why}"
    assert training["how"] in " ".join(result.output.split())
    assert training["patience"] == 1
    run("export", kept, "--out", tmp_path / "again")
    for name in ("encoder.onnx", "head.onnx", "first.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_tuning_needs_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tune learns from texts"):
        run("train", "--tune", "--out", tmp_path / "detector")


def test_a_bad_line_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bad\.jsonl line 1 is malformed"):
        run("train", "--data", _lines(tmp_path / "bad.jsonl", {"id": "1"}), "--out", tmp_path / "detector")
    assert not (tmp_path / "detector").exists()


def test_eval_writes_figures_and_plots(tiny: Path, own: Path, tmp_path: Path) -> None:
    output = run("eval", "--model", tiny, "--data", own, "--out", tmp_path / "eval")
    found = Evaluation.model_validate_json((tmp_path / "eval" / "eval.json").read_text())
    assert found.detector == Detector.load(tiny).version
    assert found.per_request["unreadable_alarming_traces"].n == found.per_request["flagged_alarming_traces"].n
    assert {"recall_complying_traces", "median_tokens_to_detection"} <= set(found.per_request)
    assert {"calibration_error", "flagged_cue_steps_harmful", "auroc_cue_vs_benign"} <= set(found.per_step)
    assert not set(found.per_request) & set(found.per_step)
    assert {"source own", "source authored", "language fr"} <= set(found.slices)
    assert set(found.attacks) == {*ATTACKS, "paraphrase", "translation"}
    assert found.tiers["recall_both_tiers"].n == found.per_request["recall_complying_traces"].n
    assert sorted(path.name for path in (tmp_path / "eval").glob("*.png")) == [
        "first_detection.png", "precision_recall.png", "reliability.png", "roc.png", "zones.png",
    ]  # fmt: skip
    assert "attack: homoglyphs" in output
    # All labelled steps are reasoning, so that zone is all there is, and the command says so.
    whole = found.per_request | found.per_step
    del whole["calibration_error"]
    assert found.per_zone == {"reasoning": whole, "answer": {}}
    assert found.notes == [NO_ANSWERS]
    assert "No labelled step of the test part stands in an answer" in " ".join(output.split())
    assert "zone: answer" not in output


@pytest.mark.usefixtures("alone")
def test_eval_measures_each_zone_that_it_is_given(
    tiny: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labelled steps, recorded outputs and judged completions of an operator's own, all with an answer."""
    monkeypatch.setattr("classifiers.corpus.demo_traces", list)
    lines = [json.loads(line) | {"answer": [2]} for line in own.read_text().splitlines() if "cue" in line]
    model, spool = kit_model(tmp_path), Spool(tmp_path / "traces")
    for number in range(3):
        trace = recorded(str(number), substituted=False)
        steps = [*trace.steps[:3], dataclasses.replace(trace.steps[3], zone="answer")]
        spool.append(trace.model_copy(update={"steps": steps}))
    responses = [
        {"request": f"How do I steal a lamp{n}?", "response": " ".join(CUES if n else SAFE), "harmful": n > 0}
        for n in range(3)
    ]
    output = run(
        "eval", "--model", tiny, "--data", _lines(tmp_path / "zoned.jsonl", *lines), "--traces", tmp_path / "traces",
        "--tokenizer", model, "--responses", _lines(tmp_path / "said.jsonl", *responses), "--out", tmp_path / "eval",
    )  # fmt: skip
    found = Evaluation.model_validate_json((tmp_path / "eval" / "eval.json").read_text())
    tests = [line for line in lines if part_of_request(line["request"]) == "test"]
    assert found.notes == []
    cues = {zone: found.per_zone[zone]["flagged_cue_steps_harmful"].n for zone in ("reasoning", "answer")}  # type: ignore[index]
    assert cues == {"reasoning": len(tests), "answer": len(tests)}
    assert found.per_step["flagged_cue_steps_harmful"].n == 2 * len(tests)
    assert found.per_zone["reasoning"]["flagged_recorded_requests"].n == 3
    assert found.per_zone["reasoning"]["flagged_recorded_steps"].n == 6
    assert found.per_zone["answer"]["flagged_recorded_steps"].n == 3
    assert found.per_zone["answer"]["flagged_harmful_answers"] == Rate.of(2, 2)
    assert found.per_zone["answer"]["flagged_harmless_answers"] == Rate.of(0, 1)
    assert "zone: answer" in output


def test_data_lists_each_source_with_licence_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    rows = {line.split("│")[1].strip(): line for line in run("data").splitlines() if line.startswith("│")}
    assert list(rows) == [source.name for source in SOURCES]
    for source in SOURCES:
        assert source.licence in rows[source.name]
        assert source.version in rows[source.name]


def test_agreement_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows to measure on"):
        run("agreement", "--responses", _lines(tmp_path / "empty.jsonl", ""))


def test_agreement_prints_a_line_a_source(tmp_path: Path) -> None:
    rows = [
        {"request": f"r{i}", "response": "I can't help with that.", "harmful": 0, "source": "mine"} for i in range(4)
    ]
    output = run("agreement", "--responses", _lines(tmp_path / "rows.jsonl", *rows))
    assert "mine" in output
