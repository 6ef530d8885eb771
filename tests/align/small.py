"""Settings of a small training stage, and what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from align.train import TrainSettings
from guard.steps import StepLimits
from tests.tiny import SPECIAL

LIMITS = StepLimits()
#: The tiny tokenizer's <|im_end|>.
END = SPECIAL.index("<|im_end|>")
#: Eight pairs, four steps; float32, so that results can be compared.
SMALL = TrainSettings(
    dtype="float32", epochs=2, batch_size=4, save_steps=2, rank=4, first_layer=1, benign_share=0.5, learning_rate=1e-3,
    sft_weight=0.0,
)  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
