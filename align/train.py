"""Training on pairs: TRL's DPO loop with LoRA, intervened pairs mixed with benign ones, plus an SFT term."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from align.pairs import Pair, Scope, cut
from guard.errors import UserError
from guard.steps import StepLimits, TokenTable


class TrainSettings(BaseModel):
    """Hyper-parameters. The paper states none but the SFT weight (0.2, in its second stage).

    The learning rate was chosen on topics that neither train nor report: at 3e-4 reasoning harm fell too little, at
    8e-4 the replies to benign requests became worse. `max_pairs` is what the demo has time for. The other values were
    changed once after a report had been seen (docs/design/0004).
    """

    model_config = ConfigDict(extra="forbid")

    scope: Scope = Scope()
    beta: float = 0.1
    sft_weight: float = 1.0
    learning_rate: float = 5e-4
    epochs: float = 4.0
    batch_size: int = 8
    rank: int = 16
    first_layer: int | None = None
    """LoRA from this layer on; None: a third of the depth, which saves backward work."""
    benign_share: float = Field(default=0.4, ge=0.0, le=1.0)
    """Benign pairs as a share of all pairs, reached by leaving out pairs of the larger kind."""
    max_pairs: int = 120
    seed: int = 0


class TrainReport(BaseModel):
    """What the run did, written beside the adapter."""

    pairs: int
    intervened: int
    benign: int
    tokens: int
    steps: int
    seconds: float
    settings: TrainSettings
    log: list[dict[str, Any]]


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mix(pairs: Sequence[Pair], settings: TrainSettings) -> list[Pair]:
    """A seeded choice of at most `max_pairs` with the wanted share of benign pairs."""
    rng = random.Random(settings.seed)
    by_kind = {kind: [p for p in pairs if p.kind == kind] for kind in ("intervened", "benign")}
    for group in by_kind.values():
        rng.shuffle(group)
    share = settings.benign_share
    total = min(
        settings.max_pairs,
        *(int(len(by_kind[k]) / s) for k, s in (("benign", share), ("intervened", 1 - share)) if s > 0),
    )
    benign = round(total * share)
    chosen = by_kind["benign"][:benign] + by_kind["intervened"][: total - benign]
    rng.shuffle(chosen)
    return chosen


def rows(pairs: Sequence[Pair], settings: TrainSettings, table: TokenTable) -> list[dict[str, list[int]]]:
    """TRL's columns: the prefix belongs to the prompt, both sides are cut to the tokens that carry the preference."""
    limits = StepLimits()
    return [
        {
            "prompt_ids": p.prompt_ids + p.prefix_ids,
            "chosen_ids": cut(p.chosen_ids, settings.scope, table, limits),
            "rejected_ids": cut(p.rejected_ids, settings.scope, table, limits),
        }
        for p in pairs
    ]


def train(model: str, pairs: Sequence[Pair], out: Path, settings: TrainSettings, table: TokenTable) -> TrainReport:
    """Trains a LoRA adapter into `out`; a checkpoint left by an interrupted run is continued."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_utils import get_last_checkpoint

    from align.branch import BranchCollator
    from align.trainer import PairTrainer
    from guard.engine.hardware import fast_dtype

    chosen = mix(pairs, settings)
    if not chosen:
        raise UserError("No pairs to train on", got=f"{len(pairs)} pairs", wanted="intervened and benign ones")
    torch.manual_seed(settings.seed)
    dtype = fast_dtype()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    depth = base.config.num_hidden_layers
    first = depth // 3 if settings.first_layer is None else settings.first_layer
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = rows(chosen, settings, table)
    print_first(chosen[0], data[0], table)
    trainer = PairTrainer(
        model=base,
        args=_arguments(settings, out, bf16=dtype == "bfloat16"),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        data_collator=BranchCollator(tokenizer.pad_token_id or 0),
        peft_config=LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS,
            layers_to_transform=list(range(first, depth)),
        ),
        sft_weight=settings.sft_weight,
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise UserError("Training diverged", got=f"loss {result.training_loss}", fix="Lower learning_rate or beta")
    trainer.save_model(str(out))
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    report = TrainReport(
        pairs=len(chosen), intervened=sum(p.kind == "intervened" for p in chosen),
        benign=sum(p.kind == "benign" for p in chosen), tokens=sum(len(v) for row in data for v in row.values()),
        steps=result.global_step, seconds=result.metrics["train_runtime"], settings=settings,
        log=trainer.state.log_history,
    )  # fmt: skip
    (out / "train.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return report


def merge(model: str, adapter: Path, out: Path) -> Path:
    """Writes the model with the adapter merged in; `out` appears only when it is whole."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        return out
    scratch = out.with_name(out.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(scratch)
    AutoTokenizer.from_pretrained(model).save_pretrained(scratch)
    scratch.rename(out)
    return out


def print_first(pair: Pair, row: dict[str, list[int]], table: TokenTable) -> None:
    """Prints one pair with the trained tokens marked: the cheapest check of masks and seams."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    shared = table.text(row["prompt_ids"][-60:])
    console.print(Text(f"first pair ({pair.kind}), shared prefix: …{shared}", style="dim"))
    console.print(Text(f"  chosen:   {table.text(row['chosen_ids'])}", style="green"))
    console.print(Text(f"  rejected: {table.text(row['rejected_ids'])}", style="red"))


def _arguments(settings: TrainSettings, out: Path, *, bf16: bool) -> Any:
    from trl import DPOConfig

    from guard.engine.hardware import on_gpu

    return DPOConfig(
        output_dir=str(out), beta=settings.beta, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size, num_train_epochs=settings.epochs, weight_decay=0.0,
        lr_scheduler_type="cosine", warmup_steps=0.1, precompute_ref_log_probs=True,
        precompute_ref_batch_size=settings.batch_size * 2, gradient_checkpointing=False, bf16=bf16, max_length=None,
        logging_steps=5, save_strategy="steps", save_steps=25, save_total_limit=1, report_to="none",
        seed=settings.seed, remove_unused_columns=False,
        dataloader_pin_memory=False, use_cpu=not on_gpu(),
    )  # fmt: skip


def read_report(out: Path) -> TrainReport | None:
    """The finished run's report, or None."""
    path = out / "train.json"
    return TrainReport.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
