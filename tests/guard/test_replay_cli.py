"""The command `replay` over a spool that the packaged detector decided."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from classifiers.detector import Detector
from classifiers.stats import Rate
from guard.errors import UserError
from guard.policy import Policy
from guard.replay import Replayer
from guard.replay_cli import replay as command
from guard.runtime import GuardRuntime
from guard.traces import Spool, read_traces
from tests.guard.recorded import (
    CALM,
    CUE,
    ONE,
    chat,
    live,
    reader,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with the kit's tokenizer; replay needs no weights."""
    directory = tmp_path_factory.mktemp("kit-model")
    chat().save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    return directory


@functools.cache
def real() -> GuardRuntime:
    """The packaged detector under a policy whose threshold every step that it reads reaches."""
    policy = Policy(name="low", threshold=0.0)
    return GuardRuntime.build(policy, Detector.load(), chat().backend_tokenizer, "kit", chat().eos_token_id)


@pytest.fixture
def spool(tmp_path: Path, model: Path) -> Path:
    """Two traces that the packaged detector decided, a probe and a torn line."""
    made = [live(CALM + CUE + CALM, run=real(), guard_id="a"), live([], run=real(), guard_id="b")]
    made.append(made[0].model_copy(deep=True, update={"guard_id": "p"}))
    made[2].receipt.policy = "probe"
    directory = tmp_path / "spool"
    for trace in made:
        Spool(directory).append(trace.model_copy(update={"model": str(model)}))
    with next(directory.iterdir()).open("ab") as out:
        out.write(b'{"guard_id": "torn\n')
    return directory


@pytest.fixture
def low(tmp_path: Path) -> Path:
    path = tmp_path / "low.yaml"
    path.write_text("name: low\nthreshold: 0.0\n")
    return path


def invoke(*args: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160"})


def refused(*args: object) -> str:
    result = invoke(*args)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def rows(output: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]


def share(k: int, n: int) -> list[str]:
    rate = Rate.of(k, n)
    return [f"{rate.rate:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]", str(n)]


def test_the_command_finds_equal_traces_equal(spool: Path, low: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.json"
    result = invoke("--traces", spool, "--policy", low, "--json", out, "--thresholds", "1, 0.0")
    assert result.exit_code == 0, result.output
    head = result.stdout.splitlines()[:3]
    assert head == [
        f"Policy low {real().policy.hash}, {real().detector.version}, threshold 0.",
        "3 traces, 1 skipped (probe 1); 1 malformed lines, 0 superseded.",
        "Same policy and detector: 2 of 2 traces came out as recorded.",
    ]
    assert rows(result.stdout) == [
        ["0", "0.500 [0.095, 0.905]", "2", "7.0 [7.0, 7.0], n 1", "1000.0 [1000.0, 1000.0], n 2"],
        ["1", "0.000 [0.000, 0.658]", "2", "", "0.0 [0.0, 0.0], n 2"],
    ]
    written = json.loads(out.read_text())
    assert written["read"] == {"files": 1, "traces": 3, "malformed": 1, "superseded": 0}
    assert (written["exact"]["traces"], written["skipped"]) == (2, {"probe": 1})
    assert [row["threshold"] for row in written["sweep"]] == [0.0, 1.0]


def test_the_command_fails_on_a_difference_and_names_it(spool: Path, low: Path, tmp_path: Path) -> None:
    trace = read_traces(spool)[0][0]
    trace.receipt.interventions[0].trigger_id = "[red]x\x1b[2J"
    Spool(spool).append(trace)
    out = tmp_path / "report.json"
    result = invoke("--traces", spool, "--policy", low, "--json", out)
    assert result.exit_code == 1
    assert "Same policy and detector: 1 of 2 traces came out as recorded.\n" in result.stdout
    (now,) = {i.trigger_id for i in Replayer(real(), reader()).exact(trace).receipt.interventions[:1]}
    assert rows(result.stdout) == [["a", "interventions[0].trigger_id", "[red]x[2J", now]]
    assert "1 differences" in result.stdout
    assert "\x1b" not in result.stdout
    assert json.loads(out.read_text())["exact"]["differing"] == ["a"]


def test_the_command_says_what_another_policy_flags(spool: Path, tmp_path: Path, model: Path) -> None:
    policy = tmp_path / "high.yaml"
    policy.write_text("threshold: 1.0\n")
    trace = read_traces(spool)[0][0]
    Spool(spool).append(trace.model_copy(update={"guard_id": "c", "request": "Ho\x1bw [b]so[/b]?", "model": "gone"}))
    result = invoke("--traces", spool, "--policy", policy, "--model", model)
    assert result.exit_code == 0, result.output
    assert "Same policy" not in result.stdout
    assert rows(result.stdout) == [
        ["a", "car", "", "step 0, token 7"],
        ["c", "How [b]so[/b]?", "", "step 0, token 7"],
        ["now", *share(0, 3)],
        ["as recorded", *share(2, 3)],
        ["both", *share(0, 3)],
        ["only now", *share(0, 3)],
        ["only as recorded", *share(2, 3)],
    ]


def test_the_table_of_traces_is_bounded_and_starts_with_what_changed(tmp_path: Path, model: Path, low: Path) -> None:
    directory = tmp_path / "many"
    policy = Policy(name="high", threshold=1.0)
    high = dataclasses.replace(real(), policy=policy, threshold=1.0)
    cued = live(CALM, run=dataclasses.replace(real(), policy=ONE))
    calm = live(CALM, run=high)
    for i in range(50):
        Spool(directory).append(cued.model_copy(update={"guard_id": f"same{i}", "model": str(model)}))
    Spool(directory).append(calm.model_copy(update={"guard_id": "new\u202e", "model": str(model)}))
    result = invoke("--traces", directory, "--policy", low)
    table = rows(result.stdout)
    assert table[0] == ["new", "car", "step 0, token 7", ""]
    assert table[1] == ["same0", "car", "step 0, token 7", "step 0, token 7"]
    assert [row[0] for row in table[50:]] == ["now", "as recorded", "both", "only now", "only as recorded"]
    assert "50 of 51; --json writes them all" in result.stdout


@pytest.mark.parametrize("text", ["", "0.5,", "x", "1.1", "-0.1", "nan", "0.5;0.7"])
def test_bad_thresholds(spool: Path, text: str) -> None:
    wanted = "wanted numbers within 0 and 1, separated by commas: 0.5,0.7,0.9."
    assert refused("--traces", spool, f"--thresholds={text}") == f"--thresholds; got {text}; {wanted}"


def test_what_cannot_be_replayed_is_a_sentence(spool: Path, model: Path, low: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused("--traces", empty) == f"{empty} holds no traces; got 0 files, 0 malformed lines."
    fix = "Point --traces at the directory that `serve` writes."
    assert refused("--traces", tmp_path / "no") == f"Trace directory {tmp_path / 'no'} does not exist. {fix}"
    wanted = "wanted a directory with config.json and tokenizer.json, a hub name, or `demo`"
    assert refused("--traces", spool, "--model", empty) == f"Model {empty} holds no config.json; {wanted}."
    (empty / "file").write_text("")
    target = empty / "file" / "report.json"
    said = refused("--traces", spool, "--policy", low, "--json", target)
    assert said == f"Report {target} cannot be written; got File exists."


def test_only_skipped_traces_are_no_success(spool: Path, tmp_path: Path) -> None:
    traces = read_traces(spool)[0]
    for trace in traces[:2]:
        Spool(spool).append(trace.model_copy(update={"tokenizer_hash": "0" * 12}))
    wanted = f"wanted clean traces of the tokenizer {real().tokenizer_hash}."
    assert refused("--traces", spool) == (
        f"No trace in {spool} can be replayed; got another tokenizer 2, probe 1; {wanted}"
    )
    gone = tmp_path / "gone"
    Spool(gone).append(traces[0].model_copy(update={"model": "no\x1b/where"}))
    assert refused("--traces", gone) == (
        "The model that wrote the traces is not here; got no/where. Give its directory with --model."
    )


def test_a_tokenizer_that_cannot_be_read_is_a_sentence(
    spool: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (damaged / "tokenizer_config.json").write_text("{")
    said = refused("--traces", spool, "--model", damaged)
    assert said.startswith(f"The tokenizer of {damaged} cannot be loaded; got ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused("--traces", spool) == (
        "replay reads chat templates with transformers. Install the extra `cpu` or `gpu`."
    )
