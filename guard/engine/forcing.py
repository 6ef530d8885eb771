"""How a token is forced: its logit is 0 and all others of its row are -inf, as if a grammar allowed nothing else.

One large logit does not do: vLLM's kernel for top-p on GPUs estimates where to cut from a row's mean and deviation,
which a logit of 1e9 spoils. With top-p it sampled id 0 instead (vLLM 0.32 on an H100). Rows with one finite logit are
what grammars make, so every sampler must cope with them; it is 0 because that kernel exponentiates it as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

FORCED, FORBIDDEN = 0.0, float("-inf")
AHEAD = 8
"""Rows of one request in a step that a plan reaches, under speculative decoding."""


def force_plans(
    logits: torch.Tensor, ctx: LogitsContext, plans: Mapping[int, tuple[int, ...]], table: torch.Tensor
) -> torch.Tensor:
    """Forces slots' plans in place, without waiting for the device: `plans` maps a slot to the ids to come.

    `logits`: [rows, vocabulary]; `table`: int32 [slots, AHEAD], host memory for the plans. Row k of a request counts
    only if its k drafts were accepted, so it must say the plan's k-th id. What a grammar forbids (-inf) stays
    forbidden, and a row with what is no number (broken weights) as it is: the next step sees that another token came,
    and says so.
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
    forced = (wanted >= 0) & (found > FORBIDDEN) & ~torch.isnan(logits).any(dim=1, keepdim=True)
    return logits.masked_fill_(forced, FORBIDDEN).scatter_(1, column, torch.where(forced, FORCED, found))
