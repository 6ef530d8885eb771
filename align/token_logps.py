"""Log-probabilities of target tokens under an LM head, without keeping anything as wide as the vocabulary.

Stock cross-entropy keeps logits, their float32 copy, log-probabilities and their gradient, each tokens x vocabulary.
Under a head that does not train, the gradient of one token's log-probability with respect to its hidden state is
`weight[target] - softmax @ weight`: a row as wide as the model, known as soon as the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LOGITS = 2**23
"""Elements of the logits that are in memory at a time: 170 tokens of the demo model's vocabulary, 55 of Qwen3's. Half
as many read the head too often, twice as many no longer stay in an EPYC's cache: 0.21 instead of 0.19 s for 475."""
LOGITS_ON_GPU = 2**27
"""The same on a GPU, where few tokens at a time would read the whole head again and again (256 MiB in bf16)."""


def token_logps(hidden: Tensor, head: nn.Module, target: Tensor) -> Tensor:
    """Log-probabilities of `target` (int64 [tokens]) in nats, float32 [tokens], where `head` (an LM head) reads
    `hidden` [tokens, d]."""
    if _frozen(head):
        logps: Tensor = _FrozenHead.apply(hidden, head.weight, target)  # type: ignore[no-untyped-call]
        return logps
    return -nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")


def _frozen(head: nn.Module) -> bool:
    """Whether it is a plain matrix that does not train and that nothing gathers or changes when it is called."""
    return (
        type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        and head.weight.is_floating_point() and not isinstance(head.weight, DTensor)
        and not head._forward_pre_hooks and not head._forward_hooks
        and "forward" not in vars(head)  # what accelerate puts there brings offloaded weights in
    )  # fmt: skip


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, (LOGITS if weight.device.type == "cpu" else LOGITS_ON_GPU) // len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(hidden[part], weight)
            top = logits.amax(-1, keepdim=True)
            # Shares that are not yet divided by their sum: one pass less over something as wide as the vocabulary.
            shares = (logits - top).exp_()
            total = shares.sum(-1, keepdim=True, dtype=torch.float32)
            logps[part] = (logits.gather(-1, target[part, None]).float() - top - total.log())[:, 0]
            if slopes is not None:
                slopes[part] = weight[target[part]] - (shares @ weight) / total
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes).to(slopes.dtype), None, None
