"""Ablations on the tiny encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from classifiers.ablate import Ablations, variants
from classifiers.build import Material
from classifiers.detector import Detector
from classifiers.trained import KEPT, Trained
from tests.classifiers.conftest import QUICK, mixed_traces
from tests.classifiers.test_cli import run


def test_variants_are_measured_on_the_same_test_part(mixed: Material, everything: Trained) -> None:
    said: list[str] = []
    found = variants(mixed, everything, QUICK, said.append)
    assert list(found) == ["everything", *said]
    assert said == [
        "without the request", "without the step before", "without authored traces", "without public traces",
        "labels: a half", "labels: a quarter",
    ]  # fmt: skip
    assert found["everything"] == everything.figures(mixed.of("test"))
    assert len({part["recall_complying_traces"].n for part in found.values()}) == 1
    assert all(set(part) <= set(KEPT) for part in found.values())
    assert found["everything"]["auroc_cue_vs_benign"].rate == 1.0


def test_the_command_writes_what_was_left_out_and_what_could_not_be(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifiers.corpus.read_authored", mixed_traces)
    monkeypatch.setattr("classifiers.corpus.demo_traces", list)
    output = run("ablate", "--model", tiny, "--out", tmp_path / "ablations.json", "--seed", 4)
    found = Ablations.model_validate_json((tmp_path / "ablations.json").read_text())
    assert (found.encoder, found.seed) == (Detector.load(tiny).version, 4)
    assert "R1-Distill-Llama-8B, never seen, all parts" in found.unseen
    assert found.kept["language fr"] == "complying traces: 1, fewer than 8"
    assert "R1-Distill-Llama-8B, never seen, test part" in output
    assert "Not left out: language fr (complying traces: 1, fewer than 8)" in output
