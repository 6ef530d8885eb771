"""`align --promote` from cron: what is new, nothing to do, another model's traces, an interruption, a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align import pipeline
from align.gate import GateSettings
from align.inherit import Inherited
from align.pairs import Pair, write_pairs
from align.promote import Weekly, promote, roll_back, weekly
from align.versions import history, locked
from align.watermark import Watermark
from cli import app
from guard.errors import UserError
from guard.policy import Policy
from guard.runtime import tokenizer_hash
from guard.traces import Intervention, Spool
from guard.weights import Registry, weights_hash
from tests.align.runs import DECLINES, make_run, pair
from tests.guard.sidecar.scripted import trace_of


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages are all on disk."""
    return make_run(tiny_model, tmp_path_factory.mktemp("finished") / "run", DECLINES)


@pytest.fixture
def log(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Logs intervened traces of the tiny model."""
    from tokenizers import Tokenizer

    tokenizer = tokenizer_hash(Tokenizer.from_file(str(tiny_model / "tokenizer.json")))
    own = weights_hash(str(tiny_model))

    def write(*ids: str, weights: str = own, intervened: bool = True) -> Path:
        done = [Intervention(step=0, at=1, trigger_id="t", score=1.0)] if intervened else []
        for guard_id in ids:
            trace = trace_of(guard_id, Policy(), interventions=done)
            known = {"tokenizer_hash": tokenizer, "weights": weights}
            Spool(tmp_path / "traces").append(trace.model_copy(update=known))
        return tmp_path / "traces"

    return write


@pytest.fixture
def run(
    tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int | None, list[str]]]:
    """A weekly run into a directory that holds what the stages would have made; they have tests of their own.

    `train` is called with the pairs where they would be trained on.
    """
    expected: dict[str, Any] = {}

    def check(bench: pipeline.Workbench, *_: object) -> None:
        assert json.loads((bench.out / "taken.json").read_text()) == expected["taken"]

    for name in ("evaluate_base", "measure"):
        monkeypatch.setattr(pipeline, name, check)
    monkeypatch.setattr(pipeline, "train_adapter", lambda _, pairs, *__: expected["train"](pairs))

    def go(
        name: str, taken: list[str], train: Callable[[list[Pair]], object] = lambda _: None
    ) -> tuple[int | None, list[str]]:
        expected.update(taken=taken, train=train)
        out, said = tmp_path / name, []
        if taken and not out.exists():
            shutil.copytree(finished, out)
            write_pairs(map(pair, taken), out / "pairs.jsonl")
        plan = Weekly(tmp_path / "traces", tmp_path / "versions", GateSettings(), min_new=2)
        settings = pipeline.AlignSettings(model=str(tiny_model))
        outcome = weekly(settings, out, plan, lambda _: [], said.append)
        return (outcome.version if outcome else None), said

    return go


def test_new_traces_only_and_nothing_to_do(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    traces = log("a")
    log("calm", intervened=False)
    assert run("week-1", []) == (
        None, [f"Nothing to do: 1 new intervened traces in {traces}, 2 are wanted for a run."]
    )  # fmt: skip
    log("b")
    assert run("week-1b", ["a", "calm", "b"]) == (1, [])
    assert Registry(tmp_path / "versions").current() == 1
    log("c")
    version, said = run("week-2", [])
    assert (version, said[0][:16]) == (None, "Nothing to do: 1")
    # The same run again: nothing new, so nothing happens; enough that is new wants a directory of its own.
    assert run("week-1b", [])[1][0].startswith("Nothing to do: 1")
    log("d")
    with pytest.raises(UserError, match=r"week-1b holds a finished run, and 2 intervened traces are new"):
        run("week-1b", [])
    trained: list[Pair] = []
    run("week-3", ["c", "d"], trained.extend)
    assert [(p.guard_id, p.earlier) for p in trained] == [
        ("c", False), ("d", False), ("a", True), ("calm", True), ("b", True)
    ]  # fmt: skip
    earlier = (tmp_path / "week-3" / "earlier_pairs.jsonl").read_text().splitlines()
    assert [json.loads(line)["guard_id"] for line in earlier] == ["a", "calm", "b"]
    assert len((tmp_path / "versions" / "consumed.jsonl").read_text().splitlines()) == 2


def test_the_base_models_replies_of_the_run_before_are_taken_over(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[list[Path]] = []

    def inherit(_: pipeline.Workbench, requests: object, runs: list[Path]) -> Inherited | None:
        asked.append(runs)
        return Inherited(run=str(runs[0]), replies=3) if runs else None

    monkeypatch.setattr("align.promote.inherit", inherit)
    log("a", "b")
    assert run("week-1", ["a", "b"]) == (1, [])
    log("c", "d")
    told = f"3 replies of the model as it came are those of {tmp_path}/week-1."
    assert run("week-2", ["c", "d"])[1] == [told]
    log("e", "f")
    run("week-3", ["e", "f"])
    assert asked == [[], [tmp_path / "week-1"], [tmp_path / "week-2", tmp_path / "week-1"]]


def test_an_interrupted_run_goes_on_with_what_it_took(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    log("a", "b")
    with pytest.raises(KeyboardInterrupt):
        run("week", ["a", "b"], interrupted)
    registry = Registry(tmp_path / "versions")
    assert (registry.current(), (registry.root / "consumed.jsonl").exists()) == (0, False)
    log("c")
    assert run("week", ["a", "b"]) == (1, [])


def test_two_weekly_runs_at_once_are_refused(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]]
) -> None:
    log("a", "b")

    def another(_: list[Pair]) -> None:
        with pytest.raises(UserError, match="Another weekly align is running for"):
            run("other", ["a", "b"])

    assert run("week", ["a", "b"], another)[0] == 1


def test_a_rollback_need_not_wait_for_a_run_and_is_not_overruled_by_it(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    log("a", "b")
    run("week-1", ["a", "b"])
    log("c", "d")

    def back(_: list[Pair]) -> None:
        with locked(tmp_path / "versions") as registry:
            roll_back(registry)

    assert run("week-2", ["c", "d"], back)[0] is None
    registry = Registry(tmp_path / "versions")
    assert (registry.current(), history(registry)[-1].reasons) == (
        0, ["version in force: 0, rolled back meanwhile, wanted 1 from the run's beginning on"]
    )  # fmt: skip
    # Its traces are consumed all the same; whether it is to serve is for a person to say.
    assert run("week-2b", [])[1][0].startswith("Nothing to do: 0")
    with locked(registry.root):
        assert promote(registry, tmp_path / "week-2", GateSettings()).version == 1


def test_what_is_in_force_again_was_somebodys_decision_too(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], finished: Path, tmp_path: Path
) -> None:
    log("a", "b")

    def there_and_back(_: list[Pair]) -> None:
        with locked(tmp_path / "versions") as registry:
            promote(registry, finished, GateSettings())
            roll_back(registry)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("week", ["a", "b"], there_and_back)
    assert run("week", ["a", "b"])[0] is None
    assert Registry(tmp_path / "versions").current() == 0


def test_a_crash_at_a_promotion_is_mended_but_not_over_a_rollback(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    log("a", "b")
    registry = Registry(tmp_path / "versions")
    for _ in range(2):
        # As if it had crashed a moment earlier: the history has the promotion, `current` has not moved.
        (registry.root / "current").unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watermark, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run("week", ["a", "b"])
        assert registry.current() == 1
    roll_back(registry)
    assert run("week", ["a", "b"])[0] is None
    assert registry.current() == 0


def test_traces_of_a_version_count_and_those_of_another_model_do_not(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    log("a", "b")
    run("week-1", ["a", "b"])
    log("c", "d", weights=Registry(tmp_path / "versions").manifest(1).weights)
    log("e", weights="another")
    run("week-2", ["c", "d"])
    log("f")
    run("week-3", [])
    collected = json.loads((tmp_path / "week-3" / "collected.json").read_text())
    assert (collected["other_weights"], collected["other_tokenizer"], collected["usable"]) == (1, 0, 5)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def invoke(*args: object) -> Any:
    """`cli.py align ARGS`, in this process: its imports take seconds."""
    return CliRunner().invoke(app, ["align", *map(str, args)])


def test_empty_traces_are_told_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    told = invoke("--model", tiny_model, "--traces", tmp_path / "traces", "--out", tmp_path / "out")
    assert str(told.exception).startswith(f"There is nothing to train on in {tmp_path}/out; got no pairs;")
    assert not (tmp_path / "out" / "evaluation").exists()


def test_cron_sees_exit_codes(log: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    common = ("--promote", "--model", tiny_model, "--traces", tmp_path / "traces", "--versions", tmp_path / "versions")
    idle = invoke(*common, "--out", tmp_path / "one")
    assert idle.exit_code == 0, idle.output
    assert idle.output.startswith("Nothing to do: 0 new intervened traces")
    gate = tmp_path / "gate.yaml"
    gate.write_text("criteria: [{figure: 'aligned: reasoning harm', bound: low, at_least: 0.6}]")
    unknown = str(invoke(*common, "--out", tmp_path / "three", "--gate", gate).exception)
    assert "key `criteria.0.figure`: no figure `aligned: reasoning harm`; wanted such as: " in unknown
    assert "aligned: reasoning harm, relative drop" in unknown
    assert not (tmp_path / "three").exists()
    log("x", weights="elsewhere")
    foreign = invoke(*common, "--out", tmp_path / "two").exception
    assert isinstance(foreign, UserError)
    assert str(foreign).startswith(f"None of the 1 traces in {tmp_path}/traces comes from {tiny_model}; got tokenizer")
    assert "weights elsewhere" in str(foreign)
