"""Preference training on intervened pairs, on TRL's DPOTrainer.

TRL brings the loop, reference precomputation, LoRA, checkpoints and logging; this class brings token-id pairs and the
shared-prefix forward pass. Three private hooks of trl 1.16 are overridden; `tests/align/test_trainer.py` trains a step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from align.loss import branch_logps, preference_loss


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """Trains on rows `prompt_ids`, `chosen_ids`, `rejected_ids` (token ids that already part at the divergence)."""

    def __init__(self, *args: Any, sft_weight: float, **kwargs: Any) -> None:
        self._sft_weight = sft_weight
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probabilities of both branches under the reference: the model with its adapter switched off."""
        adapter_off: Any = contextlib.nullcontext()
        if self.ref_model is None:
            adapter_off = use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter_off,
        ):
            return self._branches(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        chosen, rejected = self._branches(model, inputs)
        counts = torch.bincount(inputs["pair"][inputs["side"] == 0], minlength=chosen.shape[0])
        result = preference_loss(
            chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], counts,
            beta=self.beta, sft_weight=self._sft_weight,
        )  # fmt: skip
        mode = "train" if self.model.training else "eval"
        for name in ("preference", "sft", "margin", "accuracy"):
            self._metrics[mode][name].append(getattr(result, name).item())
        # A margin can grow while both sides fall: the chosen trigger's own probability is the number to watch.
        self._metrics[mode]["chosen_logp"].append(chosen.detach().mean().item())
        return (result.loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else result.loss

    @staticmethod
    def _branches(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal.model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"],
            attention_mask=inputs["attention_mask"], use_cache=False,
        ).last_hidden_state  # fmt: skip
        return branch_logps(hidden, causal.lm_head.weight, inputs)
