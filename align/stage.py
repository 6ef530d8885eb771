"""One training stage as a directory: what to do, the rows, metrics, checkpoints, and the result.

stage.json      the model, the stage it goes on from, its settings, and the pairs that were too long
rows.jsonl      the token ids that are trained on, with the ids of their pairs
reference.json  log-probabilities of both sides before the first step
metrics.jsonl   one line per logged step
checkpoint-N/   where an interrupted run goes on; gone when the stage is done
train.json      the report; there when the stage is done, beside the adapter (method `full`: the whole model)
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from align.contrast import contrasted
from align.model import load_tokenizer
from align.pairs import Kind, Pair
from align.text import ReplyReader
from align.train import TrainReport, TrainSettings, mix
from align.turns import Turns
from guard.errors import UserError
from guard.steps import StepLimits

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class StageCard(BaseModel):
    """What a stage is about."""

    model_config = ConfigDict(extra="forbid")

    model: str
    start: Path | None
    """The stage whose result this one goes on from; None: the model as it is."""
    settings: TrainSettings
    too_long: list[str] = []
    asked_again: int = 0
    """Rows of benign pairs behind other exchanges; fewer than wanted where prompts are more than a user's turn."""
    contrasted: int = 0
    """Rows of intervened pairs against a benign reply; fewer than wanted where none fits (`align.contrast`)."""


class Row(BaseModel):
    """What is trained on of one pair: the prefix belongs to the prompt, both sides are cut to the settings' scope."""

    model_config = ConfigDict(extra="forbid")

    pair: str
    kind: Kind
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Positions the model must know: prefix and longer side."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def tokens(self) -> int:
        """Prefix and both sides."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def prepare(out: Path, card: StageCard, pairs: Sequence[Pair], reader: ReplyReader, limits: StepLimits) -> None:
    """Chooses the rows and writes `stage.json` and `rows.jsonl`, or finds the same ones there. `reader`, `limits`: what
    counts as one step of a side.

    UserError when nothing is left to train on, or when `out` holds another stage.
    """
    limit = card.settings.max_length or _positions(card.model)
    lengths = {pair.id: _row(pair, card.settings, reader, limits).length for pair in pairs}
    card = card.model_copy(update={"too_long": [i for i, length in lengths.items() if length > limit]})
    chosen = mix([p for p in pairs if lengths[p.id] <= limit], card.settings)
    if not chosen:
        raise UserError(
            "No pairs to train on",
            got=f"{len(pairs)} pairs, {len(card.too_long)} of them longer than {limit} tokens",
            wanted="intervened and benign ones" if card.settings.benign_share else "intervened ones",
        )
    rows = [
        row for pair in _once_more(card, chosen, pairs, reader)
        if (row := _row(pair, card.settings, reader, limits)).length <= limit
    ]  # fmt: skip
    more = Counter(row.kind for row in rows) - Counter(pair.kind for pair in chosen)
    card = card.model_copy(update={"asked_again": more["benign"], "contrasted": more["intervened"]})
    files = {
        out / "rows.jsonl": "".join(row.model_dump_json() + "\n" for row in rows),
        out / "stage.json": card.model_dump_json(indent=1),
    }
    if (out / "stage.json").exists():
        if any(path.read_text(encoding="utf-8") != text for path, text in files.items()):
            raise UserError(f"{out} holds another training stage", fix="Delete it, or choose another directory")
        return
    out.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").replace(path)


def _once_more(card: StageCard, chosen: Sequence[Pair], pairs: Sequence[Pair], reader: ReplyReader) -> list[Pair]:
    """The chosen pairs and what the settings add to them."""
    settings, found = card.settings, list(chosen)
    if settings.contrast:
        found = contrasted(found, [pair for pair in pairs if pair.kind == "benign"], settings.contrast, settings.seed)
    if settings.benign_turns:
        found = Turns(load_tokenizer(card.model), reader).added(found, settings.benign_turns, settings.seed)
    return found


def read(out: Path) -> tuple[StageCard, list[Row]]:
    """What `prepare` wrote; UserError where there is no stage."""
    if not (out / "stage.json").exists():
        raise UserError(f"{out} holds no training stage", fix="`cli.py align train` makes one")
    card = StageCard.model_validate_json((out / "stage.json").read_text(encoding="utf-8"))
    lines = (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return card, [Row.model_validate_json(line) for line in lines]


def run(out: Path, callbacks: Sequence[Any] = ()) -> None:
    """Trains the stage in `out`, in every process that `accelerate launch` started, and writes its report."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from transformers import AutoTokenizer

    from align.callbacks import MetricsFile, StopOnDivergence, Stopwatch
    from align.trainer import PairTrainer

    if (out / "train.json").exists():
        return
    card, rows = read(out)
    settings = card.settings
    tokenizer = AutoTokenizer.from_pretrained(card.model)
    args = arguments(settings, out)
    if args.n_gpu > 1:
        raise UserError("Several GPUs are visible to one process", got=args.n_gpu, fix="Train with --accelerate FILE")
    if args.process_index == 0:
        _announce(card, rows[0], tokenizer)
    watch = Stopwatch()
    trainer = PairTrainer(
        load(card), args, [row.model_dump() for row in rows], tokenizer, settings, out,
        callbacks=[MetricsFile(out / "metrics.jsonl"), StopOnDivergence(), watch, *callbacks],
    )  # fmt: skip
    checkpoint = last_checkpoint(out)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(out))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _finish(out, card, rows, result, watch.earlier)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end (its state file comes last).

    None without the references of the same run: later weights cannot give them any more.
    """
    if not (out / "reference.json").exists():
        return None
    found = sorted(out.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    return next((path for path in found if _whole(path / "trainer_state.json")), None)


def _whole(state: Path) -> bool:
    try:
        return "global_step" in json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _positions(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)


def _row(pair: Pair, settings: TrainSettings, reader: ReplyReader, limits: StepLimits) -> Row:
    chosen, rejected = settings.scope.cut(pair, reader.table, limits)
    prompt = pair.prompt_ids + pair.prefix_ids
    return Row(pair=pair.id, kind=pair.kind, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)


def load(card: StageCard) -> Any:
    """The model with the weights that train; those of full training are float32, so that small updates count."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from guard.engine.hardware import fast_dtype

    settings = card.settings
    set_seed(settings.seed)
    full = settings.method == "full"
    source = card.start if full and card.start is not None else card.model
    base = AutoModelForCausalLM.from_pretrained(
        source, dtype="float32" if full else settings.dtype or fast_dtype(), attn_implementation="sdpa"
    )
    if full:
        return base
    if card.start is not None:
        return PeftModel.from_pretrained(base, str(card.start), is_trainable=True)
    return get_peft_model(base, lora_config(settings, base.config.get_text_config().num_hidden_layers))


def lora_config(settings: TrainSettings, depth: int) -> Any:
    """The adapter of a model with `depth` layers."""
    from peft import LoraConfig

    first = depth // 3 if settings.first_layer is None else settings.first_layer
    return LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS, task_type="CAUSAL_LM",
        layers_to_transform=list(range(first, depth)),
    )  # fmt: skip


def arguments(settings: TrainSettings, out: Path) -> Any:
    """The loop's arguments; UserError when `batch_size` does not split over the processes or a tracker is missing."""
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations

    from guard.engine.hardware import fast_dtype, on_gpu

    dtype = settings.dtype or fast_dtype()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = settings.micro_batch or max(1, settings.batch_size // world)
    if settings.batch_size % (world * micro):
        raise UserError(
            "batch_size does not split", got=f"{settings.batch_size} pairs over {world} processes of {micro}",
            wanted="a multiple of processes x micro_batch",
        )  # fmt: skip
    known = get_available_reporting_integrations()
    if missing := sorted(set(settings.report_to) - set(known)):
        raise UserError(
            f"Tracker {missing[0]} is not installed", wanted=f"one of {', '.join(known) or 'none'}",
            fix=f"pip install {missing[0]}",
        )  # fmt: skip
    return TrainingArguments(
        output_dir=str(out), learning_rate=settings.learning_rate, num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro, gradient_accumulation_steps=settings.batch_size // (world * micro),
        weight_decay=0.0, lr_scheduler_type="cosine", warmup_steps=0.1, bf16=dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        logging_steps=5, save_strategy="steps", save_steps=settings.save_steps, save_total_limit=1,
        report_to=settings.report_to or "none", seed=settings.seed, use_cpu=not on_gpu(), remove_unused_columns=False,
        dataloader_pin_memory=on_gpu(),
    )  # fmt: skip


def _announce(card: StageCard, row: Row, tokenizer: Any) -> None:
    """Prints one row with the trained tokens marked: the cheapest check of masks and seams."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if card.too_long:
        console.print(f"{len(card.too_long)} pairs are too long and left out: {', '.join(card.too_long)}")
    if card.settings.benign_turns:
        console.print(f"{card.asked_again} benign pairs are trained on once more, behind other exchanges")
    if card.settings.contrast:
        console.print(f"{card.contrasted} intervened pairs are trained on once more, against a benign reply")
    parts = (("shared prefix: …", row.prompt_ids[-60:], "dim"), ("chosen:   ", row.chosen_ids, "green"))
    console.print(Text(f"first pair ({row.kind}); only its coloured tokens are trained on", style="dim"))
    for label, ids, style in (*parts, ("rejected: ", row.rejected_ids, "red")):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode(ids))
        console.print(Text(f"  {label}{shown}", style=style))


def _finish(out: Path, card: StageCard, rows: Sequence[Row], result: Any, earlier: float) -> None:
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    report = TrainReport(
        pairs=len(rows), intervened=sum(row.kind == "intervened" for row in rows),
        benign=sum(row.kind == "benign" for row in rows), tokens=sum(row.tokens for row in rows),
        too_long=card.too_long, steps=result.global_step,
        seconds=earlier + result.metrics["train_runtime"], settings=card.settings,
    )  # fmt: skip
    scratch = out / "train.part"
    scratch.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    scratch.replace(out / "train.json")
