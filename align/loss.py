"""The intervened-preference loss: pure functions of tensors.

Source: arXiv 2509.24393, section 4 (preference over everything after the divergence) and appendix A.2 (the SFT term).
Chosen and rejected share prompt and prefix, whose log-ratio cancels, so only the tokens after the divergence appear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """Scalars of one batch; `loss` carries the gradient, the rest is for the log."""

    loss: Tensor
    preference: Tensor
    sft: Tensor
    margin: Tensor
    accuracy: Tensor


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    *,
    beta: float,
    sft_weight: float,
) -> PreferenceLoss:
    """-log sigmoid(beta * margin) + sft_weight * mean NLL of the chosen tokens.

    `chosen`, `rejected`, `ref_*`: summed log-probabilities in nats, float [pairs]. `chosen_tokens`: how many tokens
    each chosen sum runs over, [pairs]. The SFT term averages over tokens of the whole batch.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    preference = -torch.nn.functional.logsigmoid(beta * margin).mean()
    sft = -chosen.sum() / chosen_tokens.sum()
    return PreferenceLoss(
        loss=preference + sft_weight * sft,
        preference=preference.detach(),
        sft=sft.detach(),
        margin=margin.detach().mean(),
        accuracy=(margin.detach() > 0).float().mean(),
    )


def branch_logps(hidden: Tensor, head: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities [pairs] of both branches of one forward pass over `[prefix, chosen, rejected]`.

    `hidden`: [rows, width, d]; `head`: [vocabulary, d]; `batch` as `align.branch.BranchCollator` builds it. Only the
    positions that predict a branch token meet the LM head.
    """
    pair, side = batch["pair"], batch["side"]
    logits = torch.nn.functional.linear(hidden[batch["row"], batch["column"]], head).float()
    logps = -torch.nn.functional.cross_entropy(logits, batch["target"], reduction="none")
    pairs = int(pair.max()) + 1
    sums = logps.new_zeros(2 * pairs).index_add(0, pair + side * pairs, logps)
    return sums[:pairs], sums[pairs:]
