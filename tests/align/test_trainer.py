"""PairTrainer against stock TRL: the same loss and gradients; what a shared prefix can and cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainingArguments,
)  # fmt: skip

from align import attention
from align.train import TrainSettings
from align.trainer import PairTrainer
from guard.engine.hardware import on_gpu
from guard.errors import UserError

ROWS = [
    {"prompt_ids": [5, 6, 7, 8, 9, 10, 11, 12], "chosen_ids": [13, 14, 15], "rejected_ids": [16, 17]},
    {"prompt_ids": [5, 21, 22], "chosen_ids": [23], "rejected_ids": [24, 25, 26, 27, 28]},
    {"prompt_ids": [30, 31, 32, 33, 34], "chosen_ids": [35, 36, 37, 38], "rejected_ids": [39, 40, 41]},
]
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")


def random_llama(lora: bool) -> Any:
    """Three layers; LoRA on the upper two, so that the lowest can be computed once."""
    torch.manual_seed(3)
    return with_lora(LlamaForCausalLM(LlamaConfig(**SIZE))) if lora else LlamaForCausalLM(LlamaConfig(**SIZE))


def with_lora(model: Any) -> Any:
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, layers_to_transform=[1, 2]))


def ours(model: Any, out: Path, rows: list[dict[str, Any]] = ROWS, **changed: Any) -> Any:
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=len(rows), bf16=False, use_cpu=not on_gpu(), report_to="none",
        remove_unused_columns=False,
    )  # fmt: skip
    return in_a_step(PairTrainer(model, args, rows, tokenizer(), TrainSettings(**changed), out))


def stock(model: Any, reference: Any, out: Path, sft_weight: float) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = DPOConfig(
        output_dir=str(out), loss_type=["sigmoid", "sft"], loss_weights=[1.0, sft_weight], beta=0.1, max_length=None,
        bf16=False, use_cpu=not on_gpu(), gradient_checkpointing=False, report_to="none", per_device_train_batch_size=3,
    )  # fmt: skip
    rows = Dataset.from_list(ROWS)
    return in_a_step(Tokenised(model, reference, config, train_dataset=rows, processing_class=tokenizer()))


def in_a_step(trainer: Any) -> Any:
    """Gives a trainer what its loop sets before `training_step`."""
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def shake(model: Any) -> None:
    """Moves the weights that train, so that the policy is no longer its reference."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def gradients(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all rows, away from where training starts."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    trainer.training_step(trainer.model, dict(batch))
    shake(trainer.model)
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(batch))
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest distance of one parameter's gradients, as a share of all gradients' length."""
    assert a.keys() == b.keys()
    length = torch.stack([g.norm() for g in b.values()]).norm()
    return max(float((a[name] - b[name]).norm() / length) for name in b)


@pytest.mark.parametrize(("lora", "sft_weight"), [(True, 0.0), (True, 0.2), (False, 0.2)])
def test_loss_and_gradients_are_those_of_stock_trl(tmp_path: Path, lora: bool, sft_weight: float) -> None:
    mine = ours(random_llama(lora), tmp_path / "ours", sft_weight=sft_weight)
    theirs = stock(random_llama(lora), None if lora else random_llama(False), tmp_path / "stock", sft_weight)
    loss, found = gradients(mine)
    wanted_loss, wanted = gradients(theirs)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert relative(found, wanted) < 1e-4
    assert (mine._lower is not None) == lora, "the layer below the adapter was computed once"


def test_a_shared_prefix_changes_nothing_for_the_sigmoid_loss(tmp_path: Path) -> None:
    """PAPER 5.1: prefix tokens in both sides cancel; an SFT term is what sees them."""
    whole = [
        {
            "prompt_ids": row["prompt_ids"][:1],
            "chosen_ids": row["prompt_ids"][1:] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"][1:] + row["rejected_ids"],
        }
        for row in ROWS
    ]
    results = {
        (name, weight): gradients(ours(random_llama(True), tmp_path / f"{name}{weight}", rows, sft_weight=weight))
        for name, rows in (("part", ROWS), ("whole", whole))
        for weight in (0.0, 0.2)
    }
    part, full = results["part", 0.0], results["whole", 0.0]
    assert part[0] == pytest.approx(full[0], rel=1e-4)
    assert relative(part[1], full[1]) < 1e-4
    assert abs(results["part", 0.2][0] - results["whole", 0.2][0]) > 1e-2
    assert relative(results["part", 0.2][1], results["whole", 0.2][1]) > 1e-2


def test_micro_batches_and_checkpointing_give_the_same_gradients(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[0] | {"rejected_ids": [50, 51, 52]}, ROWS[2]]
    plain = gradients(ours(random_llama(True), tmp_path / "plain", rows, sft_weight=0.0))
    again = ours(random_llama(True), tmp_path / "again", rows, sft_weight=0.0)
    again.model.gradient_checkpointing_enable({"use_reentrant": False})
    again.model.enable_input_require_grads()
    found = gradients(again)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative(found[1], plain[1]) < 1e-5


def test_bf16_attends_in_one_product_a_key_head_and_stays_near_float32(tmp_path: Path) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = ours(random_llama(True).to(dtype), tmp_path / str(dtype), sft_weight=0.2)
        with patch.object(attention, "sdpa_attention_forward", wraps=attention.sdpa_attention_forward) as stock:
            results.append(gradients(trainer))
        # The model's own pass over the longest row, which the head is checked against, has no mask.
        narrow = dtype == torch.bfloat16 and not on_gpu()
        assert (stock.call_count == SIZE["num_hidden_layers"]) == narrow
    (loss, exact), (rounded, found) = results
    assert rounded == pytest.approx(loss, rel=0.02)
    assert relative({n: g.float() for n, g in found.items()}, exact) < 0.05


@pytest.mark.parametrize(("config", "skips"), [(Qwen3Config, True), (GraniteConfig, False)])
def test_frozen_layers_are_left_out_only_where_that_is_sound(tmp_path: Path, config: Any, skips: bool) -> None:
    """Granite scales what enters its first layer, whichever that is."""
    torch.manual_seed(3)
    trainer = ours(with_lora(AutoModelForCausalLM.from_config(config(**SIZE, embedding_multiplier=3.0))), tmp_path)
    trainer.training_step(trainer.model, dict(trainer.data_collator(trainer.train_dataset)))
    assert (trainer._lower is not None) == skips
    assert trainer._reference is not None
    assert trainer._logged["margin"] == [pytest.approx(0.0, abs=1e-4)]


def test_a_head_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZE, final_logit_softcapping=0.5))
    trainer = ours(with_lora(model), tmp_path)
    with pytest.raises(UserError, match="Gemma2ForCausalLM cannot be trained with a shared prefix"):
        trainer.training_step(trainer.model, dict(trainer.data_collator(trainer.train_dataset)))
