"""`cli.py align evaluate` and `reproduce`: what a user gets wrong is told before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.pipeline import AlignSettings
from guard.errors import UserError


@pytest.mark.parametrize("command", ["evaluate", "reproduce"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0,0"], "--seeds; got 0,0; wanted different whole numbers, such as 0,1,2."),
        (["--seeds", "a"], "--seeds; got a; wanted different"),
        (["--seeds", "-1"], "--seeds; got -1; wanted different"),
        (["--baselines", "sft,dpo"], "--baselines; got dpo; wanted names of sft, full-dpo, full-dpo-norm."),
        (["--judge", "openai:localhost,m"], "--judge; got openai:localhost,m; wanted openai:URL,MODEL"),
    ],
)
def test_bad_options_are_told_at_once(command: str, options: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, [command, "--model", str(tmp_path), "--out", str(out), *options])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not out.exists()


def test_only_a_run_of_the_model_can_be_evaluated(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["evaluate", "--model", "/models/other", "--out", str(out)]
    nothing = CliRunner().invoke(app, command)
    assert str(nothing.exception).startswith(f"{out} holds no align run. Run `cli.py align`")
    out.mkdir()
    (out / "align.json").write_text(AlignSettings(model="/models/one", seed=3).model_dump_json())
    another = CliRunner().invoke(app, command)
    assert f"{out} holds a run of another model; got /models/other; wanted /models/one." in str(another.exception)


def test_an_evaluation_has_the_runs_length_unless_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[AlignSettings] = []
    monkeypatch.setattr("align.reproduce.evaluate", lambda settings, *_: seen.append(settings))
    (tmp_path / "align.json").write_text(AlignSettings(model="/models/one", max_tokens=77).model_dump_json())
    command = ["evaluate", "--model", "/models/one", "--out", str(tmp_path)]
    for more in ([], ["--max-tokens", "99"]):
        assert CliRunner().invoke(app, [*command, *more]).exit_code == 0
    assert [settings.max_tokens for settings in seen] == [77, 99]


@pytest.mark.parametrize("command", ["evaluate", "reproduce"])
def test_help_teaches_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert f"cli.py align {command} --model" in shown
    assert "openai:URL,MODEL" in shown
