"""lm-eval: what is read from its results, and what a user is told when it cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.harness import read_harness, run_harness
from classifiers.stats import Rate
from guard.errors import UserError

RESULTS = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 76,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.05,
        },
        "odd": {"alias": "odd", "acc,none": 0.0, "acc_stderr,none": 0.0},
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 76}, "odd": {"original": 6, "effective": 6}},
}


def test_figures_with_their_intervals() -> None:
    assert read_harness(RESULTS, ["gsm8k", "odd"]) == {"gsm8k": Rate.of(19, 76), "odd": Rate.of(0, 6)}
    with pytest.raises(UserError, match="no figure of arc; wanted one of gsm8k, arc"):
        read_harness(RESULTS, ["gsm8k", "arc"])


def test_finished_results_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert run_harness("/no/such/model", ["gsm8k"], tmp_path)["gsm8k"].rate == 0.25


def test_without_lm_eval_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed\. Run `pip install lm-eval`"):
        run_harness("m", ["gsm8k"], tmp_path / "new")
