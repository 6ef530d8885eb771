"""Preference training on intervened pairs, on the transformers Trainer and the accelerate under it.

They bring the loop, checkpoints, resuming, logging, DDP, FSDP and DeepSpeed. This class brings prefixes and references
that are computed once, and the loss. `tests/align/test_trainer.py` holds loss and gradients against TRL's DPOTrainer;
docs/design/0003 says why it does not stand on that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Trainer

from align import attention
from align.branch import BranchCollator
from align.callbacks import diverged
from align.head import add_branch_head
from align.loss import preference_loss
from align.lower import LowerLayers
from align.train import TrainSettings
from guard.errors import UserError

LOGGER = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Nats a token by which two ways to the same log-probability may differ; bf16 gives up to 0.02 on the demo model."""


class PairTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed
    """Trains `model` on rows of token ids: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    `out`: where `reference.json` is kept, for a run that goes on from a checkpoint. The model must be the one that
    training starts from: before the first step it is its own reference.
    """

    def __init__(
        self, model: Any, args: Any, rows: Sequence[dict[str, Any]], tokenizer: Any, settings: TrainSettings, out: Path,
        callbacks: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._causal = model.get_base_model() if isinstance(model, PeftModel) else model
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, BaseTunerLayer):
                # Autocast already gives the adapter its inputs in the format it computes in.
                module.cast_input_dtype_enabled = False
        self._causal.set_attn_implementation(attention.NAME)
        add_branch_head(self._causal)
        self._rows = _numbered(rows)
        self._pair_settings = settings
        self._reference_file = out / "reference.json"
        self._reference: Tensor | None = None
        self._lower: LowerLayers | None = None
        self._logged: defaultdict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=model, args=args, train_dataset=self._rows, processing_class=tokenizer,
            data_collator=BranchCollator(tokenizer.pad_token_id or 0), callbacks=list(callbacks),
        )  # fmt: skip
        # The loss is a mean over pairs: accumulated steps are averaged by the Trainer.
        self.model_accepts_loss_kwargs = False

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; before the first, the reference pass over all rows."""
        if self._reference is None:
            self._reference = self._look_ahead(model)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `align.loss.preference_loss`; UserError when it is no number."""
        if self._reference is None:
            raise RuntimeError("the reference pass comes first")
        chosen, rejected = self._branches(model, inputs)
        reference = self._reference[inputs["index"]]
        settings = self._pair_settings
        counts, others = (
            torch.bincount(inputs["pair"][inputs["side"] == side], minlength=len(reference)) for side in (0, 1)
        )
        result = preference_loss(
            chosen, rejected, reference[:, 0], reference[:, 1], counts, others if settings.per_token else None,
            beta=settings.beta, sft_weight=settings.sft_weight,
        )  # fmt: skip
        # A margin can grow while both sides fall: the chosen trigger's own probability is the number to watch.
        seen = {"chosen_logp": chosen.detach().mean(), **result._asdict()}
        values = torch.stack([value.detach() for value in seen.values()]).tolist()
        for name, value in zip(seen, values, strict=True):
            if not math.isfinite(value):
                raise diverged(self.args, self.state, f"{name} {value}")
            if name != "loss":
                self._logged[name].append(value)
        return (result.loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, of the main process's share."""
        logs |= {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        super().log(logs, start_time)

    def _branches(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = dict(inputs)
        source = batch.pop("source")
        if self._lower is not None:
            del batch["input_ids"]
            batch["inputs_embeds"] = self._lower.look_up(source)
        chosen, rejected = model(**batch)
        return chosen, rejected

    @torch.no_grad()
    def _look_ahead(self, model: Any) -> Tensor:
        """Log-probabilities [rows, 2] of both sides before the first step, each computed once; or those on disk.

        A process alone also keeps what the frozen layers make of the rows. Every process runs as many forward passes
        as the others: under FSDP each takes part in all.
        """
        model.eval()
        known, lower = self._known(), self._frozen()
        if known is not None and lower is None:
            return known
        values = torch.zeros(len(self._rows), 2, device=self.args.device)
        batches, world = self._batches(), self.args.world_size
        for first in range(0, len(batches), world):
            number = first + self.args.process_index
            batch = self._prepare_inputs(self.data_collator([self._rows[i] for i in batches[number % len(batches)]]))
            with contextlib.nullcontext() if lower is None else lower.kept(batch["source"]):
                sums = torch.stack(self._branches(model, batch), dim=1).float()
            if number < len(batches):
                values[batch["index"]] = sums
        if known is None:
            known = self.accelerator.reduce(values, "sum")
            self._check_head(model, known)
            if self.is_world_process_zero():
                self._reference_file.with_suffix(".part").write_text(json.dumps(known.tolist()), encoding="utf-8")
                self._reference_file.with_suffix(".part").replace(self._reference_file)
        if lower is not None:
            self._start_above(model, lower, batch, sums)
        return known

    def _known(self) -> Tensor | None:
        if not self._reference_file.exists():
            return None
        return torch.tensor(json.loads(self._reference_file.read_text(encoding="utf-8")), device=self.args.device)

    def _frozen(self) -> LowerLayers | None:
        if self.accelerator.distributed_type != DistributedType.NO:
            return None
        return LowerLayers.of(self._causal, sum(_length(row) for row in self._rows))

    def _batches(self) -> list[list[int]]:
        """Rows of similar length together, twice as many as in training: nothing is kept for a backward pass."""
        order = sorted(range(len(self._rows)), key=lambda i: -_length(self._rows[i]))
        size = 2 * self.args.per_device_train_batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _check_head(self, model: Any, values: Tensor) -> None:
        """UserError where the model's own forward pass over one side, the longest row's, gives another result."""
        number = max(range(len(self._rows)), key=lambda i: _length(self._rows[i]))
        row = self._rows[number]
        chosen = torch.tensor(row["chosen_ids"], device=values.device)
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=values.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(chosen) + 1).logits[0, :-1]
        alone = -torch.nn.functional.cross_entropy(logits.float(), chosen, reduction="sum")
        off = abs(float(alone - values[number, 0])) / len(chosen)
        if not off <= TOLERANCE:
            raise UserError(
                f"{type(self._causal).__name__} cannot be trained with a shared prefix",
                got=f"log-probabilities {off:.3f} nats a token away from the model's own",
                wanted="a plain LM head and attention that takes a 4-D mask",
            )

    def _start_above(self, model: Any, lower: LowerLayers, batch: dict[str, Tensor], before: Tensor) -> None:
        """Lets the epochs start above the frozen layers, if that gives the same result."""
        lower.remove()
        self._lower = lower
        after = torch.stack(self._branches(model, batch), dim=1).float()
        tokens = torch.bincount(batch["pair"], minlength=len(before))
        if float(((after - before).abs().sum(dim=1) / tokens).max()) <= TOLERANCE:
            lower.forget()
            return
        lower.restore()
        self._lower = None
        LOGGER.warning("%s cannot start above its frozen layers: they run in every epoch", type(self._causal).__name__)


def _numbered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their number and with where each begins in a table of all their positions."""
    found, offset = [], 0
    for index, row in enumerate(rows):
        found.append(row | {"index": index, "offset": offset})
        offset += _length(row)
    return found


def _length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
