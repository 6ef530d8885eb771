"""What this machine computes on, and in which number format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Dtype = Literal["bfloat16", "float32"]


def fast_dtype() -> Dtype:
    """`bfloat16` on GPUs and on CPUs with bf16 instructions, else `float32`.

    A CPU without them emulates bf16: one LoRA step on a 135M model then took over 10 minutes instead of 5 s (measured
    on an AVX2-only EPYC with torch 2.13).
    """
    return "bfloat16" if on_gpu() or cpu_has_bf16() else "float32"


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bf16 itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def on_gpu() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def encoder_workers() -> int:
    """Threads for the detector's encoder.

    Beside a model on GPUs half of one GPU's share of the cores, 8 at most: while they encode, the device computes.
    Where the CPU computes the model, one: every other would take a core from it.
    """
    if not on_gpu():
        return 1
    import torch

    return max(1, min(8, len(os.sched_getaffinity(0)) // (2 * torch.cuda.device_count())))
