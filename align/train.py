"""Training on pairs: what one stage of training is, which pairs it takes, and what it leaves behind.

A stage is a directory (`align.stage`), so that the same code trains it in this process, in a process of its own and
under `accelerate launch`.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.pairs import Pair, Scope
from align.text import ReplyReader
from guard.engine.hardware import Dtype
from guard.errors import UserError
from guard.steps import StepLimits


class TrainSettings(BaseModel):
    """One stage. The paper states no hyper-parameter but the SFT weight (0.2, in its second stage).

    The learning rate was chosen on topics that neither train nor report: below it more answers comply, above it more
    benign requests are refused. `max_pairs` is what the demo has time for. The other values were
    changed once after a report had been seen (docs/design/0004).
    """

    model_config = ConfigDict(extra="forbid")

    scope: Scope = Scope()
    benign: Literal["trigger", "refusal"] = "trigger"
    """A benign pair's rejected side: a trigger in the step's place, or what the stage before refuses to say."""
    benign_share: float = Field(default=0.4, ge=0.0, le=1.0)
    """Benign pairs as a share of all pairs, reached by leaving out pairs of the larger kind."""
    max_pairs: int = 120
    """Pairs over it are left out: those of earlier runs before the run's own."""
    max_length: int | None = None
    """Tokens of prefix and longer side; longer rows are left out and named, never cut. None: what the model takes."""
    beta: float = 0.1
    per_token: bool = False
    """Divide each side's log-ratio by its number of tokens (length-normalised DPO, which wants a larger beta)."""
    sft_weight: float = 1.0
    benign_turns: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the benign pairs that are trained on once more, behind other benign exchanges (`align.turns`)."""
    contrast: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the intervened pairs that are trained on once more, against a benign reply (`align.contrast`)."""
    learning_rate: float = 6.5e-4
    epochs: float = 4.0
    batch_size: int = 8
    """Pairs per optimizer step, over all processes."""
    micro_batch: int | None = None
    """Pairs per process that are computed at once; None: all of a step."""
    method: Literal["lora", "full"] = "lora"
    rank: int = 16
    first_layer: int | None = None
    """LoRA from this layer on; None: a third of the depth. What lies below is computed once (`align.lower`)."""
    dtype: Dtype | None = None
    """What is computed in; None: what the machine computes fast in. Full training keeps its weights in float32."""
    gradient_checkpointing: bool = False
    save_steps: int = 25
    """Optimizer steps from one checkpoint to the next."""
    report_to: list[str] = []
    """Trackers beside `metrics.jsonl`: `wandb`, `tensorboard`, or what else transformers knows."""
    seed: int = 0

    @model_validator(mode="after")
    def _full_has_no_rank(self) -> TrainSettings:
        if self.method == "full" and self.first_layer is not None:
            raise ValueError("first_layer belongs to method lora: full training changes every layer")
        return self


class TrainReport(BaseModel):
    """What a stage did: `train.json`, written last."""

    pairs: int
    intervened: int
    benign: int
    tokens: int
    """Of all rows, once each: prefix, chosen and rejected side."""
    too_long: list[str]
    """Ids of the pairs that were left out for their length."""
    steps: int
    seconds: float
    """Of the steps that count, over all runs that it took; the reference pass is part of them."""
    settings: TrainSettings


def mix(pairs: Sequence[Pair], settings: TrainSettings) -> list[Pair]:
    """A seeded choice of at most `max_pairs` with the wanted share of benign pairs. Of each kind a run's own pairs come
    first, those of earlier runs fill up what is left; before both come those that the stage before refuses."""
    rng = random.Random(settings.seed)
    by_kind = {kind: [p for p in pairs if p.kind == kind] for kind in ("intervened", "benign")}
    for group in by_kind.values():
        rng.shuffle(group)
        # A stable sort: chance decides among a run's own pairs, and among the earlier ones.
        group.sort(key=lambda pair: (pair.answered, pair.earlier))
    share = settings.benign_share
    total = min(
        settings.max_pairs,
        *(int(len(by_kind[k]) / s) for k, s in (("benign", share), ("intervened", 1 - share)) if s > 0),
    )
    benign = round(total * share)
    chosen = by_kind["benign"][:benign] + by_kind["intervened"][: total - benign]
    rng.shuffle(chosen)
    return chosen


def train(
    model: str,
    pairs: Sequence[Pair],
    out: Path,
    settings: TrainSettings,
    reader: ReplyReader,
    limits: StepLimits,
    *,
    start: Path | None = None,
    accelerate: Path | None = None,
) -> TrainReport:
    """Trains one stage into `out`; what an interrupted run left there is continued.

    `reader`, `limits`: how a pair's sides fall into steps. `start`: the stage whose result this one goes on from.
    `accelerate`: a configuration for `accelerate launch`, which then runs the stage (many GPUs, FSDP, DeepSpeed); None
    trains in this process. UserError when nothing is left to train on, when `out` holds another stage, or when the loss
    is no number any more.
    """
    from align import stage

    stage.prepare(out, stage.StageCard(model=model, start=start, settings=settings), pairs, reader, limits)
    if accelerate is None:
        stage.run(out)
    else:
        _launch(out, accelerate)
    report = read_report(out)
    if report is None:
        raise UserError(f"Training left no report in {out}", fix="Run the same command again to go on")
    return report


def merge(model: str, trained: Path, out: Path) -> Path:
    """Writes the whole model that a stage trained; `out` appears only when it is whole."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        return out
    scratch = out.with_name(out.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    if (trained / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        PeftModel.from_pretrained(base, str(trained)).merge_and_unload().save_pretrained(scratch)
    else:
        AutoModelForCausalLM.from_pretrained(trained, dtype="float32").save_pretrained(scratch)
    AutoTokenizer.from_pretrained(model).save_pretrained(scratch)
    scratch.rename(out)
    return out


def read_report(out: Path) -> TrainReport | None:
    """The finished stage's report, or None."""
    path = out / "train.json"
    return TrainReport.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _launch(out: Path, config: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if subprocess.run([*command, "-m", "align.launch", str(out)], check=False).returncode != 0:
        raise UserError(
            f"`accelerate launch` with {config} failed",
            got=f"see above; the stage is {out}",
            fix="Run the same command again to go on from the last checkpoint",
        )
