"""What the machine gives the guard's encoder."""

from __future__ import annotations

import os

import pytest
import torch

from guard.engine.hardware import encoder_workers


@pytest.mark.parametrize(
    ("gpus", "cores", "workers"), [(0, 64, 1), (1, 1, 1), (1, 2, 1), (1, 8, 4), (1, 64, 8), (8, 96, 6), (8, 8, 1)]
)
def test_the_encoder_takes_half_of_a_gpus_cores_and_one_where_the_cpu_computes_the_model(
    monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int, workers: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert encoder_workers() == workers
