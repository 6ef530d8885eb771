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
    rejected_tokens: Tensor | None = None,
    *,
    beta: float,
    sft_weight: float,
) -> PreferenceLoss:
    """-log sigmoid(beta * margin) + sft_weight * mean NLL of the chosen tokens.

    `chosen`, `rejected`, `ref_*`: summed log-probabilities in nats, float [pairs]. `chosen_tokens`: how many tokens
    each chosen sum runs over, [pairs]. `rejected_tokens`: the same of the rejected side where the loss is to be
    normalised by length (each side's log-ratio per token), else None. The SFT term averages over tokens of the whole
    batch.
    """
    gained, lost = chosen - ref_chosen, rejected - ref_rejected
    if rejected_tokens is not None:
        gained, lost = gained / chosen_tokens, lost / rejected_tokens
    margin = gained - lost
    preference = -torch.nn.functional.logsigmoid(beta * margin).mean()
    sft = -chosen.sum() / chosen_tokens.sum()
    return PreferenceLoss(
        loss=preference + sft_weight * sft,
        preference=preference.detach(),
        sft=sft.detach(),
        margin=margin.detach().mean(),
        accuracy=(margin.detach() > 0).float().mean(),
    )


def branch_logps(logps: Tensor, pair: Tensor, side: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities [pairs] of the chosen and the rejected side, in nats.

    `logps`: float [tokens], of the tokens after the divergence; `pair`, `side` (0 chosen, 1 rejected): whose they are,
    int64 [tokens].
    """
    sums = logps.new_zeros(2 * pairs).index_add(0, pair + side * pairs, logps)
    return sums[:pairs], sums[pairs:]
