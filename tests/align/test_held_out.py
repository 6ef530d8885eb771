"""What is measured is never trained on, wherever the pairs come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align import pipeline, study
from align.evaluate import EvalRequest
from align.held_out import HeldOut, keep_apart, left_out
from align.measure import _notes
from align.pairs import Pair
from align.refusals import refusal_id
from align.stage import Row
from guard.errors import UserError
from tests.align.runs import pair

REQUESTS = [EvalRequest(id="q", topic="q", label="harmful", request="How do I  break IN?", prompt_ids=[1])]


def asking(guard_id: str, request: str) -> Pair:
    return pair(guard_id).model_copy(update={"request": request})


PAIRS = [asking("a", "how do i break in?"), asking("b", "How do I break in? "), asking("c", "How do I bake?")]


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """As much of a workbench as is looked at."""
    return SimpleNamespace(out=tmp_path, settings=pipeline.AlignSettings(model="m"))


def test_pairs_of_measured_requests_are_left_out_told_and_noted(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert left_out(bench.out) is None
    assert keep_apart(bench, PAIRS, REQUESTS) == PAIRS[2:]
    assert left_out(bench.out) == HeldOut(pairs=2, requests=1)
    told = " ".join(capfd.readouterr().err.split())
    assert told == "2 of 3 pairs are left out of training: they come from 1 requests that are measured"
    (bench.out / "pairs.json").write_text('{"pairs": {}, "dropped": {}}')
    (bench.out / "collected.json").write_text('{"usable": 1, "traces": 1, "with_intervention": 1, "malformed": 0}')
    assert "Pairs not trained on because their requests are measured: 2 (of 1 requests)." in _notes(bench)
    (bench.out / "collected.json").unlink()
    assert not [note for note in _notes(bench) if note.startswith("Traces")], "pairs of prompts alone"
    assert keep_apart(bench, PAIRS[2:], REQUESTS) == PAIRS[2:]
    assert capfd.readouterr().err == ""


def test_a_study_trains_and_its_baselines_too_on_what_is_left(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[list[Pair]] = []
    for name, found in {
        "evaluate_base": ({"base": []}, {}), "evaluate_aligned": {"aligned": []}, "by_keyword": [],
        "_substitute": None, "_attempt": None, "detector_sees": [], "measure_baseline": ([], []),
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, lambda *_, found=found: found)
    monkeypatch.setattr(pipeline, "train_adapter", lambda _, pairs: trained.append(pairs))
    monkeypatch.setattr(study, "train_baseline", lambda _, name, pairs: trained.append(pairs))
    bench.judge = bench.runtime = None
    study.run_seed(bench, PAIRS, REQUESTS, study.StudySettings(baselines=("sft",)))
    assert trained == [PAIRS[2:]] * 2


def test_a_run_without_other_pairs_ends_before_anything_is_measured(bench: Any) -> None:
    with pytest.raises(UserError, match=r"nothing to train on in .*; got 2 pairs, all of requests that are measured"):
        pipeline.train_and_measure(bench, PAIRS[:2], REQUESTS)


@pytest.mark.parametrize("where", ["adapter", "stage-1", "baselines/sft/adapter"])
@pytest.mark.parametrize("refused", [False, True])
def test_what_was_trained_on_cannot_be_measured_any_more(bench: Any, where: str, refused: bool) -> None:
    row = Row(
        pair=refusal_id(PAIRS[0]) if refused else PAIRS[0].id, kind="benign", prompt_ids=[1], chosen_ids=[2],
        rejected_ids=[3],
    )  # fmt: skip
    (bench.out / where).mkdir(parents=True)
    (bench.out / where / "rows.jsonl").write_text(row.model_dump_json() + "\n")
    with pytest.raises(UserError, match="was trained on 1 pairs whose requests are to be measured now"):
        keep_apart(bench, PAIRS, REQUESTS)
    assert keep_apart(bench, PAIRS, []) == PAIRS
