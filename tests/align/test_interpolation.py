"""Weights between the model as it came and as trained: exact points of the line, from one training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align import stage
from align.curve import train_points
from align.curve_points import CurveSettings
from align.interpolation import between, interpolate
from align.pairs import Pair
from align.pipeline import AlignSettings, Workbench
from align.text import ReplyReader
from align.train import TrainSettings, merge, read_report, train
from guard.errors import UserError
from tests.align.small import LIMITS, SMALL, weights

HALF = SMALL.model_copy(update={"interpolation": 0.5})


def whole(model: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(model, dtype="float32").state_dict()
    return state


def test_merged_weights_lie_halfway(small_model: Path, trained: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    between(trained, half, HALF)
    came = whole(small_model)
    full, middle = (whole(merge(str(small_model), part, tmp_path / part.name / "merged")) for part in (trained, half))
    changed = [name for name in came if not torch.equal(came[name], full[name])]
    assert len(changed) > 5
    for name in changed:
        torch.testing.assert_close(middle[name], (came[name] + full[name]) / 2, rtol=1e-5, atol=1e-7)


def test_training_with_it_gives_what_comes_after_training(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path, tmp_path: Path
) -> None:
    report = train(str(small_model), pairs, tmp_path / "own", HALF, reader, LIMITS)
    later = between(trained, tmp_path / "later", HALF)
    assert report.settings == later.settings == HALF
    assert stage.read(tmp_path / "own")[0] == stage.read(tmp_path / "later")[0]
    own, after = weights(tmp_path / "own"), weights(tmp_path / "later")
    assert own.keys() == after.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight, after[name], rtol=1e-6, atol=1e-9)
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in own.items())


def test_what_is_there_is_kept_and_another_stage_refused(trained: Path, tmp_path: Path) -> None:
    first = between(trained, tmp_path / "half", HALF)
    before = (tmp_path / "half" / "adapter_model.safetensors").stat().st_mtime_ns
    assert between(trained, tmp_path / "half", HALF) == first == read_report(tmp_path / "half")
    assert (tmp_path / "half" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="half holds another training stage"):
        between(trained, tmp_path / "half", HALF.model_copy(update={"interpolation": 0.25}))
    with pytest.raises(UserError, match="is not the same stage, trained to its end"):
        between(trained, tmp_path / "other", HALF.model_copy(update={"beta": 0.2}))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished)
    (unfinished / "train.json").unlink()
    with pytest.raises(UserError, match="is not the same stage, trained to its end"):
        between(unfinished, tmp_path / "other", HALF)
    assert not (tmp_path / "other").exists()


def test_the_whole_change_is_left_alone(trained: Path, tmp_path: Path) -> None:
    before = (trained / "adapter_model.safetensors").stat().st_mtime_ns
    interpolate(trained, 1.0)
    assert (trained / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_full_training_has_no_change_to_scale() -> None:
    with pytest.raises(ValueError, match="interpolation belongs to method lora"):
        TrainSettings(method="full", interpolation=0.5)


def test_a_curve_trains_its_points_once(small_model: Path, pairs: list[Pair], tmp_path: Path) -> None:
    settings = AlignSettings(model=str(small_model), stages=[SMALL])
    grid = CurveSettings(steps=(1,), interpolation=(0.5, 1.0, 0.25)).points(SMALL)
    with Workbench.open(settings, tmp_path) as bench:
        found = train_points(bench, grid, pairs)
    assert [report.settings.interpolation for report in found.values()] == [0.5, 1.0, 0.25]
    assert len({report.seconds for report in found.values()}) == 1, "all of one training"
    half, full, quarter = (weights(tmp_path / "curve" / "points" / point.name / "adapter") for point in grid)
    for name, weight in full.items():
        share = 0.5 if "lora_B" in name else 1.0
        torch.testing.assert_close(half[name], weight * share, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(quarter[name], weight * share * share, rtol=1e-6, atol=0.0)
