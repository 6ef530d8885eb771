"""How a token is forced: one logit of 1e9 instead of a row of -inf, so no row is ever left without a finite logit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

FORCE = 1e9
AHEAD = 8
"""Rows of one request in a step that a plan reaches, under speculative decoding."""


def force_plans(
    logits: torch.Tensor, ctx: LogitsContext, plans: Mapping[int, tuple[int, ...]], table: torch.Tensor
) -> torch.Tensor:
    """Forces slots' plans in place, without waiting for the device: `plans` maps a slot to the ids to come.

    `logits`: [rows, vocabulary]; `table`: int32 [slots, AHEAD], host memory for the plans. Row k of a request counts
    only if its k drafts were accepted, so it must say the plan's k-th id. What a grammar forbids (-inf) stays
    forbidden: the next step sees that another token came, and says so.
    """
    table.fill_(-1)
    for index, plan in plans.items():
        table[index, : len(plan)] = torch.tensor(plan[:AHEAD], dtype=torch.int32)
    ahead = ctx.expanded_local_pos.long()
    wanted = table.to(logits.device, non_blocking=True).long()[
        ctx.expanded_idx_mapping.long(), ahead.clamp(max=AHEAD - 1)
    ]
    wanted = torch.where(ahead < AHEAD, wanted, -1)[:, None]
    column = wanted.clamp(min=0)
    found = logits.gather(1, column)
    return logits.scatter_(1, column, torch.where((wanted >= 0) & (found > float("-inf")), FORCE, found))
