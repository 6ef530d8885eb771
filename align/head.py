"""A causal model that answers with both sides' log-probabilities, called through whatever wraps it.

DDP, FSDP and DeepSpeed hook the outermost call, so it is the model's own `forward` that has to know about branches;
everything else of the model stays as it is.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from align.loss import branch_logps
from align.token_logps import token_logps


def add_branch_head(causal: Any) -> None:
    """Lets `causal(**batch)` return (chosen, rejected), summed log-probabilities [pairs], for a batch with `target`.

    `batch` as `align.branch.BranchCollator` builds it. Only positions that predict a branch token meet the LM head.
    Calls without `target` are answered as before. `causal`: a transformers model with an LM head, not yet wrapped.
    """
    stock = causal.forward

    @functools.wraps(stock)
    def forward(*args: Any, target: Tensor | None = None, **kwargs: Any) -> Any:
        if target is None:
            return stock(*args, **kwargs)
        hidden = causal.get_decoder()(
            input_ids=kwargs.get("input_ids"), inputs_embeds=kwargs.get("inputs_embeds"),
            position_ids=kwargs["position_ids"], attention_mask=kwargs["attention_mask"], use_cache=False,
        ).last_hidden_state  # fmt: skip
        logps = token_logps(hidden[kwargs["row"], kwargs["column"]], causal.get_output_embeddings(), target)
        return branch_logps(logps, kwargs["pair"], kwargs["side"], len(kwargs["index"]))

    causal.forward = forward
