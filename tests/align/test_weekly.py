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
from align.promote import Weekly, weekly
from align.versions import locked
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
    """A weekly run into a directory that holds what the stages would have made; they have tests of their own."""

    def stages(bench: pipeline.Workbench, *_: object) -> None:
        assert json.loads((bench.out / "taken.json").read_text()) == expected["taken"]
        if expected["interrupt"]:
            raise KeyboardInterrupt

    for name in ("evaluate_base", "measure"):
        monkeypatch.setattr(pipeline, name, stages)
    expected: dict[str, object] = {}

    def go(name: str, taken: list[str], *, interrupt: bool = False) -> tuple[int | None, list[str]]:
        expected.update(taken=taken, interrupt=interrupt)
        out, said = tmp_path / name, []
        if taken and not out.exists():
            shutil.copytree(finished, out)
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
    run("week-3", ["c", "d"])
    earlier = (tmp_path / "week-3" / "earlier_pairs.jsonl").read_text().splitlines()
    assert [json.loads(line)["guard_id"] for line in earlier] == [pair("a").guard_id, pair("b").guard_id]
    assert len((tmp_path / "versions" / "consumed.jsonl").read_text().splitlines()) == 2


def test_an_interrupted_run_goes_on_with_what_it_took(
    log: Callable[..., Path], run: Callable[..., tuple[int | None, list[str]]], tmp_path: Path
) -> None:
    log("a", "b")
    with pytest.raises(KeyboardInterrupt):
        run("week", ["a", "b"], interrupt=True)
    registry = Registry(tmp_path / "versions")
    assert (registry.current(), (registry.root / "consumed.jsonl").exists()) == (0, False)
    log("c")
    assert run("week", ["a", "b"]) == (1, [])
    with locked(registry.root), pytest.raises(UserError, match="Another align is writing"):
        run("week", ["a", "b"])


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
    log("x", weights="elsewhere")
    foreign = invoke(*common, "--out", tmp_path / "two").exception
    assert isinstance(foreign, UserError)
    assert str(foreign).startswith(f"None of the 1 traces in {tmp_path}/traces comes from {tiny_model}; got tokenizer")
    assert "weights elsewhere" in str(foreign)
