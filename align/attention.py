"""Attention of the narrow rows that a CPU trains on in bf16: the query heads that share a key head in one product.

torch's own ways compute in float32 there or repeat the keys for every query head. On two cores of an EPYC, the demo's
layer and 4 rows of 219: 9 ms forward and backward, torch's flash attention 24, its whole matrices 24
(`python -m benchmarks.align` measures the training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_narrow"
"""What transformers calls it, for `set_attn_implementation`."""

NARROW = 512
"""Positions of a row up to which it is used: the scores are kept for the backward pass, and grow as the square."""


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What attends of `query` [rows, heads, width, d] to `key`, `value` [rows, key heads, width, d], as [rows, width,
    heads, d]. `attention_mask`: bool [rows, 1, width, width], in which no position attends to nothing.

    Whatever is not a narrow row in bf16 under such a mask is transformers' sdpa's.
    """
    plain = not dropout and kwargs.get("position_bias") is None
    if attention_mask is None or not plain or not _narrow(query, key, attention_mask):
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return stock
    rows, heads, width, size = query.shape
    groups = rows * key.shape[1]
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scores = scaled.reshape(groups, -1, size) @ key.reshape(groups, width, size).transpose(1, 2)
    hidden = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    weights = (scores.view(rows, heads, width, width) + hidden).softmax(-1)
    seen = weights.view(groups, -1, width) @ value.reshape(groups, width, -1)
    return seen.view(rows, heads, width, -1).transpose(1, 2).contiguous(), None


def _narrow(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Whether this way pays: in float32 it is no faster than flash attention, and half as fast in rows of 430."""
    return (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2] <= NARROW
        and mask.dtype == torch.bool and mask.shape[1] == 1
    )  # fmt: skip


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
