"""Reports of runs in which something has no cases: every shape of the report can be made, and no goal is met by it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from align.arms import Evaluation, evaluate_base
from align.controls import Control, run_controls
from align.evaluate import NO_CASES, summarise
from align.gate import GateSettings, decide
from align.generate import EngineSpec, Generator
from align.markdown import load_report, markdown
from align.measure import build_report
from align.model import load_runtime, load_tokenizer
from align.pipeline import AlignSettings
from align.report import Goal, print_table, write_report
from align.train import TrainReport, TrainSettings
from classifiers.stats import Rate
from tests.align.outcomes import outcome


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Any:
    """As much of a workbench as a report looks at."""
    tokenizer = load_tokenizer(str(tiny_model))
    (tmp_path / "pairs.json").write_text('{"pairs": {}, "dropped": {}}')
    (tmp_path / "collected.json").write_text('{"usable": 1, "traces": 1, "with_intervention": 1, "malformed": 0}')
    return SimpleNamespace(
        out=tmp_path, settings=AlignSettings(model=str(tiny_model)), tokenizer=tokenizer, reader=None,
        runtime=load_runtime(str(tiny_model), tokenizer, None, None), judge=SimpleNamespace(
            version="j", metrics={}, judge=lambda rows: []
        ),
    )  # fmt: skip


def test_a_base_model_without_a_cue_has_controls_without_cases(bench: Any) -> None:
    rows = [outcome("h"), outcome("b", "benign"), outcome("a", "alarming")]
    outcomes = {name: rows for name in ("base", "base+guard", "base+primer", "aligned", "aligned+guard")}
    generator = Generator(EngineSpec(model="none"), bench.out / "engine.log")
    controls = run_controls(
        rows[:1], generator, bench.runtime, bench.tokenizer.backend_tokenizer, bench.reader, bench.judge, bench.out,
        max_tokens=9,
    )  # fmt: skip
    evaluation = Evaluation(arms={name: summarise(found) for name, found in outcomes.items()}, controls=controls)
    report = build_report(bench, outcomes, evaluation)
    none = [goal for goal in report.goals if "in the cue's place" in goal.name]
    assert [(goal.met, getattr(goal.got, "n", None)) for goal in none] == [(False, 0), (False, 0)]
    page = write_report(report, bench.out).read_text()
    assert "no cases" in page
    assert "nan" not in page.casefold()
    shown = io.StringIO()
    print_table(report, Console(file=shown, width=200))
    for text in (shown.getvalue(), markdown(load_report(bench.out / "report.json"))):
        assert "a neutral sentence in the cue's place: refusals, distance from the cue" in text
        assert "no cases n=0" in text
    assert not decide(report, GateSettings()).passed


def test_arms_and_controls_have_the_runs_length(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def arms(*_: object, max_tokens: int) -> dict[str, list[Any]]:
        asked["arms"] = max_tokens
        return {"base": []}

    def controls(*_: object, max_tokens: int, seed: int) -> dict[str, Any]:
        asked["controls"] = max_tokens
        return {}

    monkeypatch.setattr("align.arms.run_arms", arms)
    monkeypatch.setattr("align.arms.run_controls", controls)
    bench.settings, bench.generator = AlignSettings(model="m", max_tokens=77), lambda name: name
    evaluate_base(bench, [])
    assert asked == {"arms": 77, "controls": 77}


@pytest.mark.parametrize(("sign", "limit"), [("<=", 0.1), (">=", -0.1)])
def test_a_goal_without_cases_is_not_met(sign: str, limit: float) -> None:
    assert Goal.of("g", sign, limit, Rate.of(0, 4)).met
    assert not Goal.of("g", sign, limit, Rate.of(0, 0)).met


def test_the_speed_is_that_of_all_stages(bench: Any) -> None:
    rows = [outcome("h"), outcome("b", "benign"), outcome("a", "alarming")]
    outcomes = {name: rows for name in ("base", "base+guard", "base+primer", "aligned", "aligned+guard")}
    none = Control(reasoning_harm=NO_CASES, refusal=NO_CASES)
    evaluation = Evaluation(
        arms={name: summarise(found) for name, found in outcomes.items()},
        controls=dict.fromkeys(("cue", "trigger", "neutral"), none),
    )
    bench.settings = bench.settings.model_copy(update={"stages": [TrainSettings(), TrainSettings()]})
    speeds = []
    for name, pairs, epochs, seconds in (("stage-1", 70, 4.0, 60.0), ("adapter", 80, 2.0, 28.0)):
        trained = TrainReport(
            pairs=pairs, intervened=pairs, benign=0, tokens=9, too_long=[], steps=1, seconds=seconds,
            settings=TrainSettings(epochs=epochs),
        )  # fmt: skip
        (bench.out / name).mkdir()
        (bench.out / name / "train.json").write_text(trained.model_dump_json())
        speeds.append(build_report(bench, outcomes, evaluation).speed)
    assert speeds == [{}, {"training_seconds": 88.0, "training_pairs": 150.0, "pairs_per_second": 5.0}]
