"""The aligner, stage by stage: collect -> rollouts and pairs -> train -> evaluate. Each stage resumes from disk.

out/align.json          what this run is about (model, settings); another run's directory is refused
out/collected.json      which traces were read, which were left out and why
out/rollouts.jsonl      counterfactual continuations
out/pairs.jsonl         confirmed pairs; out/pairs.json counts what was dropped and why
out/adapter/            the LoRA adapter and train.json
out/aligned/            the merged model
out/evaluation/         outputs per arm; out/evaluation.json the table
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from align import rollouts
from align.controls import Control, run_controls
from align.evaluate import PRIMER, Arm, ArmReport, EvalRequest, Outcome, run_arms, summarise
from align.generate import EngineSpec, read_results
from align.pairs import Pair, read_pairs, write_pairs
from align.text import ReplyReader
from align.train import TrainReport, TrainSettings, merge, read_report, train
from classifiers.detector import Detector
from classifiers.judge import Judge
from guard.errors import UserError
from guard.policy import load_policy
from guard.runtime import GuardRuntime
from guard.traces import Trace, read_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AlignSettings(BaseModel):
    """One run of the aligner."""

    model_config = ConfigDict(extra="forbid")

    model: str
    policy: Path | None = None
    detector: Path | None = None
    judge: Path | None = None
    triggers: int = 1
    train: TrainSettings = TrainSettings()
    seed: int = 0


class Evaluation(BaseModel):
    """Arms by name, and the controls."""

    arms: dict[str, ArmReport]
    controls: dict[str, Control]


@dataclass
class Workbench:
    """What the stages share: tokenizer-bound parts, the judge, and the run's directory."""

    settings: AlignSettings
    out: Path
    tokenizer: PreTrainedTokenizerBase
    runtime: GuardRuntime
    reader: ReplyReader
    judge: Judge

    @classmethod
    def open(cls, settings: AlignSettings, out: Path) -> Workbench:
        """Loads tokenizer, detector and judge; claims `out` for these settings."""
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, settings)
        tokenizer = load_tokenizer(settings.model)
        runtime = GuardRuntime.build(
            load_policy(settings.policy), Detector.load(settings.detector), tokenizer.backend_tokenizer, settings.model
        )
        reader = ReplyReader(runtime.table, runtime.delimiters)
        return cls(settings, out, tokenizer, runtime, reader, Judge.load(settings.judge))

    def engine(self, model: str | Path, spool: Path | None) -> EngineSpec:
        """The engine for one stage; with a spool it is guarded by the run's policy and detector."""
        guard: dict[str, Any] | None = None
        if spool is not None:
            guard = {"spool": str(spool)}
            guard |= {k: str(v) for k in ("policy", "detector") if (v := getattr(self.settings, k)) is not None}
        return EngineSpec(model=str(model), guard=guard, seed=self.settings.seed)

    def prompt(self, request: str) -> list[int]:
        """A request as the model's chat template renders it."""
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False
        )
        return [int(i) for i in ids]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; an unknown model is a UserError."""
    from transformers import AutoTokenizer

    path = Path(model)
    if model.startswith((".", "/")) and not (path / "config.json").exists():
        raise UserError(f"Model {model} was not found", wanted="a directory with config.json, or a hub name")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"Model {model} cannot be loaded", got=str(error).split("\n")[0]) from error


def collect(bench: Workbench, traces: Path) -> list[Trace]:
    """Traces of this model's tokenizer from a directory, the rest counted by reason."""
    found, report = read_traces(traces)
    mine = [t for t in found if t.tokenizer_hash == bench.runtime.tokenizer_hash]
    usable = [t for t in mine if t.receipt.clean and t.receipt.policy != "probe"]
    summary = report.model_dump() | {
        "other_tokenizer": len(found) - len(mine), "not_clean_or_probe": len(mine) - len(usable), "usable": len(usable),
        "with_intervention": sum(bool(t.receipt.interventions) for t in usable),
    }  # fmt: skip
    (bench.out / "collected.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if found and not mine:
        raise UserError(
            f"None of the {len(found)} traces in {traces} comes from {bench.settings.model}",
            got=f"tokenizer {found[0].tokenizer_hash} ({found[0].model})", wanted=bench.runtime.tokenizer_hash,
        )  # fmt: skip
    return usable


def make_pairs(bench: Workbench, traces: Sequence[Trace]) -> list[Pair]:
    """Rolls out and judges, unless `pairs.jsonl` is there already."""
    path = bench.out / "pairs.jsonl"
    if path.exists():
        return read_pairs(path)
    pairs, dropped = rollouts.run(
        traces, bench.runtime.triggers, bench.engine(bench.settings.model, None), bench.reader, bench.judge,
        rollouts.RolloutSettings(triggers=bench.settings.triggers, seed=bench.settings.seed), bench.out,
    )  # fmt: skip
    counts = {kind: sum(p.kind == kind for p in pairs) for kind in ("intervened", "benign")}
    (bench.out / "pairs.json").write_text(json.dumps({"pairs": counts, "dropped": dropped}, indent=1), encoding="utf-8")
    write_pairs(pairs, path)
    return pairs


def train_adapter(bench: Workbench, pairs: Sequence[Pair]) -> TrainReport:
    """Trains, unless the adapter is there already."""
    adapter = bench.out / "adapter"
    report = read_report(adapter)
    if report is None:
        report = train(bench.settings.model, pairs, adapter, bench.settings.train, bench.runtime.table)
    return report


def evaluate(bench: Workbench, requests: Sequence[EvalRequest]) -> dict[str, list[Outcome]]:
    """All five arms on the same requests."""
    out = bench.out / "evaluation"
    primer = tuple(bench.tokenizer.encode(PRIMER, add_special_tokens=False))
    base = [Arm("base", "base"), Arm("base+guard", "base", guard=True), Arm("base+primer", "base", opening=primer)]
    outcomes = run_arms(
        base, requests, bench.engine(bench.settings.model, out / "spool-base"), bench.reader, bench.judge, out
    )
    merged = merge(bench.settings.model, bench.out / "adapter", bench.out / "aligned")
    aligned = [Arm("aligned", "aligned"), Arm("aligned+guard", "aligned", guard=True)]
    return outcomes | run_arms(
        aligned, requests, bench.engine(merged, out / "spool-aligned"), bench.reader, bench.judge, out
    )


def controls(bench: Workbench, outcomes: Sequence[Outcome]) -> dict[str, Control]:
    """The three-sentence control on the base arm's harmful outputs."""
    out = bench.out / "evaluation"
    raw = read_results(out / "base.jsonl")
    harmful = [(o, raw[f"base|{o.request.id}"].output_ids) for o in outcomes if o.request.label == "harmful"]
    return run_controls(
        harmful, bench.engine(bench.settings.model, None), bench.runtime, bench.tokenizer.backend_tokenizer,
        bench.reader, bench.judge, out, seed=bench.settings.seed,
    )  # fmt: skip


def measure(bench: Workbench, requests: Sequence[EvalRequest]) -> Evaluation:
    """Evaluates all arms and the controls, and writes `evaluation.json` with `report.json` and `report.html`."""
    from align.measure import build_report
    from align.report import print_table, write_report

    outcomes = evaluate(bench, requests)
    found = controls(bench, outcomes["base"])
    evaluation = Evaluation(arms={name: summarise(rows) for name, rows in outcomes.items()}, controls=found)
    (bench.out / "evaluation.json").write_text(evaluation.model_dump_json(indent=1), encoding="utf-8")
    result = build_report(bench, outcomes, evaluation)
    write_report(result, bench.out)
    print_table(result, Console())
    return evaluation


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run's lock; a second run on the same output is a UserError. The kernel drops it when we die."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another align is running on {out}", fix="Wait for it, or choose another --out") from error
        yield


def _claim(out: Path, settings: AlignSettings) -> None:
    card = settings.model_dump_json(indent=1)
    path = out / "align.json"
    if path.exists() and _digest(path.read_text(encoding="utf-8")) != _digest(card):
        raise UserError(f"{out} holds another align run", fix="Choose another --out")
    path.write_text(card, encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
