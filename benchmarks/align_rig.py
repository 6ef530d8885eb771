"""What `benchmarks.align` measures: the demo's kind of pairs, and one trainer of each kind on them.

python -m benchmarks.align_rig KIND MODEL SHARE prints one trainer's peak memory, in a process of its own.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from align import stage
from align.train import TrainSettings
from align.trainer import PairTrainer
from demo.rows import render_rows
from guard.engine.hardware import fast_dtype, on_gpu
from guard.triggers import POOL

PAIRS = 8
"""Per turn: one step of the demo's training."""
SETTINGS = TrainSettings(epochs=1)
PARTING = ("cue", "fine", "sense")
"""Kinds of sentences at which a pair's sides part."""


def demo_pairs(tokenizer: Any, count: int, share: float) -> list[dict[str, list[int]]]:
    """Rows as the demo trains on, cut to its scope: a trigger and what follows it against a cue and what follows, or a
    benign reasoning against a trigger, after one prefix.

    `share`: the prefix is made this large a part of prefix, chosen and rejected side, with sentences of other traces;
    0 leaves it as it is.
    """
    rng = random.Random(0)
    traces = render_rows("align")
    openings = [text for trace in traces for kind, text in trace.steps if kind in ("open_plain", "neutral")]
    decisions = [text for trace in traces for kind, text in trace.steps if kind == "decide"]
    found: list[dict[str, list[int]]] = []
    for trace in traces:
        at = next((i for i, (kind, _) in enumerate(trace.steps) if kind in PARTING), None)
        if at is None or len(found) == count:
            continue
        messages = [{"role": "user", "content": trace.request}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        own = SETTINGS.scope.steps if trace.kind == "harmful" else SETTINGS.scope.benign_steps
        said = _ids(tokenizer, "".join(f" {text}" for _, text in trace.steps[at:][:own]))
        trigger = _ids(tokenizer, f" {rng.choice(POOL).text} {rng.choice(decisions)}")
        prefix = _ids(tokenizer, " ".join(text for _, text in trace.steps[:at]))
        while share and len(prompt) + len(prefix) < share / (1 - share) * (len(said) + len(trigger)):
            prefix += _ids(tokenizer, " " + rng.choice(openings))
        chosen, rejected = (trigger, said) if trace.kind == "harmful" else (said, trigger)
        found.append({"prompt_ids": [*prompt, *prefix], "chosen_ids": chosen, "rejected_ids": rejected})
    return found


@dataclass(frozen=True)
class Source:
    """What every trainer of a comparison is given; `base` makes the frozen weights anew."""

    base: Callable[[], Any]
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    checkpointing: bool = False

    @property
    def settings(self) -> TrainSettings:
        """One epoch over the rows, in one step."""
        return SETTINGS.model_copy(update={"batch_size": len(self.rows), "gradient_checkpointing": self.checkpointing})


def demo_source(model: str, share: float) -> Source:
    """The demo model and its kind of pairs (`demo_pairs`)."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=fast_dtype())

    return Source(base, tokenizer, demo_pairs(tokenizer, PAIRS, share))


class Lap(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Seconds between the loop's start and its end."""

    def __init__(self) -> None:
        self._start = self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The model is ready and nothing has run."""
        self._start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last step is done."""
        self.seconds = time.perf_counter() - self._start


class Contender:
    """One trainer: `ours`, `trl` as it comes, or `trl, references first`."""

    def __init__(self, kind: str, source: Source, out: Path) -> None:
        self.kind = kind
        self._source = source
        self._lap = Lap()
        out.mkdir(parents=True)
        if kind == "ours":
            self.trainer: Any = self._ours(out)
            # What runs once must be timed again and again: it needs a model whose frozen layers are still there.
            self.untrained: Any = self._ours(out / "untrained")
        else:
            self.trainer = self.untrained = self._stock(out)

    def step(self) -> float:
        """Seconds a pair of one epoch's training."""
        self.trainer.train()
        return self._lap.seconds / len(self._source.rows)

    def once(self) -> float:
        """Seconds a pair of what is done before the first epoch: references."""
        if self.kind == "trl":
            return 0.0
        trainer, rows = self.untrained, self._source.rows
        start = time.perf_counter()
        with torch.no_grad():
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
            if self.kind == "ours":
                # The loop wraps its model in this; the untrained one has seen no loop.
                with trainer.accelerator.autocast():
                    found = trainer._branches(trainer.model, batch)
            else:
                found = trainer.compute_ref_log_probs(trainer.model, batch)
            float(found[0].sum())  # a GPU has not finished before it is asked
        return (time.perf_counter() - start) / len(rows)

    def forget_untrained(self) -> None:
        """Frees what only `once` needs."""
        self.untrained = None

    def _ours(self, out: Path) -> Any:
        given, settings = self._source, self._source.settings
        args = stage.arguments(settings, out)
        # A lap is one step: a checkpoint at its end, which comes every 25 in training, would count in each.
        args.save_strategy = SaveStrategy.NO
        return PairTrainer(
            get_peft_model(*self._base()), args, given.rows, given.tokenizer, settings, out, [self._lap]
        )  # fmt: skip

    def _base(self) -> tuple[Any, Any]:
        """The frozen model and the adapter's configuration, the same for every trainer."""
        base = self._source.base()
        set_seed(0)
        return base, stage.lora_config(self._source.settings, base.config.num_hidden_layers)

    def _stock(self, out: Path) -> Any:
        """TRL's trainer with the same model, adapter, loss, batch and number format."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Tokenised(DPOTrainer):  # type: ignore[misc]
            """Takes rows of token ids."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        given, settings = self._source, self._source.settings
        args = DPOConfig(
            output_dir=str(out), beta=settings.beta, loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, settings.sft_weight], learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size, num_train_epochs=1, weight_decay=0.0, max_length=None,
            gradient_checkpointing=given.checkpointing, bf16=fast_dtype() == "bfloat16", use_cpu=not on_gpu(),
            precompute_ref_log_probs=self.kind.endswith("first"), precompute_ref_batch_size=len(given.rows),
            report_to="none", save_strategy="no",
        )  # fmt: skip
        base, lora = self._base()
        return Tokenised(
            base, args=args, train_dataset=Dataset.from_list(given.rows), processing_class=given.tokenizer,
            peft_config=lora, callbacks=[self._lap],
        )  # fmt: skip


def peak_mib() -> float:
    """The most memory this process has held since `forget_peak`, in MiB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found.group(1)) / 1024 if found else float("nan")


def forget_peak() -> None:
    """Starts the count of `peak_mib` anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        contender = Contender(sys.argv[1], demo_source(sys.argv[2], float(sys.argv[3])), Path(scratch) / "out")
        contender.forget_untrained()
        forget_peak()
        contender.step()
        sys.stdout.write(f"{peak_mib():.0f}\n")
