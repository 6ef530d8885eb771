"""Training a stage: what it leaves, what an interruption leaves, what stops it, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import TrainerCallback

from align import stage
from align.pairs import Pair
from align.text import ReplyReader
from align.train import TrainSettings, read_report, train
from guard.engine.hardware import on_gpu
from guard.engine.launch import free_port
from guard.errors import UserError
from tests.align.small import LIMITS, SMALL, steps, weights

CONFIGS = Path(stage.__file__).parent / "configs"


def test_a_stage_leaves_its_report_metrics_and_adapter(trained: Path, pairs: list[Pair]) -> None:
    report = read_report(trained)
    assert report is not None
    assert (report.pairs, report.intervened, report.benign, report.steps) == (8, 4, 4, 4)
    assert report.settings == SMALL
    _, rows = stage.read(trained)
    assert {row.pair for row in rows} == {pair.id for pair in pairs}
    assert report.tokens == sum(row.tokens for row in rows)
    assert steps(trained) == [4]
    assert not list(trained.glob("checkpoint-*"))
    assert any(value.abs().max() > 0 for name, value in weights(trained).items() if "lora_B" in name)
    references = json.loads((trained / "reference.json").read_text())
    assert len(references) == 8
    assert all(value < 0 for row in references for value in row)


PAUSE = 30.0
"""Longer than all of this training takes."""


class Interrupt(TrainerCallback):
    """Ctrl-C after one step; the first took `PAUSE` seconds, as far as anybody can tell."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self._patch = step, monkeypatch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            clock = time.monotonic
            self._patch.setattr("align.callbacks.time.monotonic", lambda: clock() + PAUSE)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_stage_goes_on_to_the_same_adapter(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stage.run(out, [Interrupt(3, patch)])
    assert read_report(out) is None
    (out / "checkpoint-3").mkdir()
    assert stage.last_checkpoint(out) == out / "checkpoint-2", "a checkpoint without its state is not whole"
    (out / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3, "loss": 1.0}\n{"st')
    train(str(small_model), pairs, out, SMALL, reader, LIMITS)
    found, wanted = weights(out), weights(trained)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert steps(out) == [2, 4]
    report = read_report(out)
    assert report is not None
    assert report.seconds > PAUSE, "the steps before the checkpoint count too"


@pytest.mark.filterwarnings("ignore")
def test_a_diverging_stage_stops_and_keeps_its_last_good_weights(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    with pytest.raises(UserError, match=r"diverged at step 4; got chosen_logp nan\..*checkpoint-2"):
        stage.run(out, [Poison()])
    assert read_report(out) is None
    assert all(value.isfinite().all() for value in weights(out / "checkpoint-2").values())


def test_full_training_changes_the_lowest_layer_too(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    settings = TrainSettings(method="full", dtype="float32", epochs=3, batch_size=8, benign_share=0.5)
    train(str(small_model), pairs, tmp_path / "full", settings, reader, LIMITS)
    before, after = load_file(small_model / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="first_layer belongs to method lora"):
        TrainSettings(method="full", first_layer=1)


def test_two_processes_of_accelerate_launch_give_the_adapter_of_one(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent.parent)}
    result = subprocess.run([*command, "-m", "align.launch", str(out)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found, wanted = weights(out), weights(trained)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=2e-4)
    assert json.loads((out / "reference.json").read_text()) == [
        pytest.approx(row, abs=1e-4) for row in json.loads((trained / "reference.json").read_text())
    ]


@pytest.mark.skipif(not on_gpu(), reason="accelerate shards on GPUs alone")
@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("full", "float32"), ("lora", "bfloat16")])
@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_a_gpu_that_shards_gives_the_weights_of_one_that_does_not(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path, name: str, method: str, dtype: str
) -> None:
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    own = {"first_layer"} if method == "full" else set()
    settings = TrainSettings.model_validate(SMALL.model_dump(exclude=own) | {"method": method, "dtype": dtype})
    one, out = tmp_path / "one", tmp_path / name
    train(str(small_model), pairs, one, settings, reader, LIMITS)
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=settings), pairs, reader, LIMITS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--num_processes", "1", "--main_process_port", str(free_port())]
    command += ["--mixed_precision", "bf16" if dtype == "bfloat16" else "no", "-m", "align.launch", str(out)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONFIGS.parent.parent), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    found, wanted = load_file(out / file), load_file(one / file)
    assert found.keys() == wanted.keys()
    near = {"rtol": 1e-3, "atol": 2e-4} if dtype == "float32" else {"rtol": 0.05, "atol": 2e-3}
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], **near)
    references = [torch.tensor(json.loads((place / "reference.json").read_text())) for place in (out, one)]
    torch.testing.assert_close(*references, rtol=1e-4 if dtype == "float32" else 0.02, atol=1e-3)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_accelerate_understands_the_configs(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == name.upper()
    assert config.num_processes == 8
