"""The aligner, stage by stage: collect -> rollouts and pairs -> train -> evaluate. Each stage resumes from disk.

out/align.json          what this run is about (model, settings); another run's directory is refused
out/collected.json      which traces were read, which were left out and why
out/rollouts.jsonl      counterfactual continuations; out/samples.jsonl replies to prompts
out/pairs.jsonl         confirmed pairs; out/pairs.json and out/pairs.md are their card
out/stage-N/            training stages before the last, if the recipe has several (align.stage)
out/adapter/            the last stage: the LoRA adapter and train.json
out/aligned/            the merged model
out/evaluation/         outputs per arm; out/evaluation.json the table
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from align.backend import Backend
from align.candidates import RolloutSettings
from align.card import publish
from align.controls import Control, run_controls
from align.disk import full_disk_told, one_writer
from align.evaluate import PRIMER, Arm, ArmReport, EvalRequest, Outcome, run_arms, summarise
from align.generate import EngineSpec, Generator, read_results
from align.model import load_runtime, load_tokenizer, render, render_chat
from align.pairs import Pair, read_pairs
from align.recipe import read_stages, run_stages
from align.rollouts import Harvest, roll_out
from align.sources import NO_IDS, OTHER_TOKENIZER, OTHER_WEIGHTS, Prompt, set_aside
from align.tables import is_parquet, read_trace_table
from align.text import ReplyReader
from align.tools import Tools
from align.train import TrainReport, TrainSettings, merge
from classifiers.judge import Judge
from guard.engine.hardware import on_gpu
from guard.errors import UserError
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.traces import Trace, read_traces
from guard.weights import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AlignSettings(BaseModel):
    """One run of the aligner."""

    model_config = ConfigDict(extra="forbid")

    model: str
    policy: Path | None = None
    detector: Path | None = None
    judge: Path | None = None
    stages: list[TrainSettings] = [TrainSettings()]
    seed: int = 0
    max_tokens: int = 160
    """Of a reply that is evaluated."""

    @classmethod
    def of(cls, model: str, policy: Path | None = None, seed: int = 0, stages: Path | None = None) -> Self:
        """What a command line asks for. `model` may be `demo`; `stages` is a recipe file, None the one-stage recipe."""
        if model == "demo":
            from demo.model import reasoner_model

            model = str(reasoner_model())
        recipe = [TrainSettings()] if stages is None else read_stages(stages)
        seeded = [stage.model_copy(update={"seed": seed}) for stage in recipe]
        return cls(model=model, policy=policy, seed=seed, stages=seeded)


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
    context: int = EngineSpec.model_fields["max_model_len"].default
    """Tokens that the engine takes, prompt and continuation together."""
    _generator: Generator | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, settings: AlignSettings, out: Path) -> Iterator[Workbench]:
        """Locks `out`, claims it for these settings, loads tokenizer, detector and judge; at the end no engine runs.

        UserError when another run holds the lock or the directory, and when the disk is full.
        """
        taken = UserError(f"Another align is running on {out}", fix="Wait for it, or choose another --out")
        with one_writer(out, taken), full_disk_told(out):
            claim(out / "align.json", settings.model_dump_json(indent=1), f"{out} holds another align run")
            bench = cls._load(settings, out)
            try:
                yield bench
            finally:
                if bench._generator is not None:
                    bench._generator.close()

    @classmethod
    def _load(cls, settings: AlignSettings, out: Path) -> Workbench:
        tokenizer = load_tokenizer(settings.model)
        runtime = load_runtime(settings.model, tokenizer, settings.policy, settings.detector)
        reader = ReplyReader(runtime.table, runtime.grammar)
        context = max(cls.context, 2 * settings.max_tokens)
        return cls(settings, out, tokenizer, runtime, reader, Judge.load(settings.judge), context)

    def generator(self, model: str) -> Generator:
        """The run's engine with the weights of one of its models (`weights`), guarded by its policy and detector where
        a job asks for it."""
        path = str(self.weights(model))
        if self._generator is None:
            evaluation = self.out / "evaluation"
            guard = {"spool": str(evaluation / "spool")}
            guard |= {k: str(v) for k in ("policy", "detector") if (v := getattr(self.settings, k)) is not None}
            spec = EngineSpec(model=path, guard=guard, seed=self.settings.seed, max_model_len=self.context)
            self._generator = Generator(spec, evaluation / "engine.log")
        self._generator.use(path)
        return self._generator

    def make_room(self) -> None:
        """Ends an engine that holds the memory which training needs: on a GPU all of it, on a CPU next to none."""
        if self._generator is not None and on_gpu():
            self._generator.close()

    @property
    def aligned(self) -> Path:
        """Where the merged model goes."""
        return self.out / "aligned"

    def weights(self, model: str) -> str | Path:
        """Where `base`, `aligned` or the model of a baseline lies."""
        known: dict[str, str | Path] = {"base": self.settings.model, "aligned": self.aligned}
        return known.get(model, self.out / "baselines" / model / "merged")

    def prompt(self, request: str) -> list[int]:
        """A request as the model's chat template renders it."""
        return render(self.tokenizer, request)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as the model's chat template renders it, up to where the model goes on."""
        return render_chat(self.tokenizer, messages)


def collect(bench: Workbench, traces: str | Path, versions: Iterable[str] = ()) -> list[Trace]:
    """Traces of this model, told by the hashes of its tokenizer and its weights, from a directory that `serve` writes,
    or from Parquet; the rest is counted by reason. `versions`: weights hashes of versions that were trained from it,
    whose traces are taken too."""
    where = str(traces)
    found, report = read_trace_table(where) if is_parquet(where) else read_traces(Path(where))
    reader = PromptReader.build(bench.tokenizer, bench.runtime.table, bench.runtime.grammar)
    own = weights_hash(bench.settings.model)
    known = {"", own, *versions} if own else None
    reasons = [set_aside(trace, bench.runtime.tokenizer_hash, known) for trace in found]
    usable = [reader.restored(trace) for trace, reason in zip(found, reasons, strict=True) if reason is None]
    counts = {reason: reasons.count(reason) for reason in (OTHER_TOKENIZER, OTHER_WEIGHTS, NO_IDS)}
    others = counts[OTHER_TOKENIZER] + counts[OTHER_WEIGHTS]
    summary = report.model_dump() | {
        "other_tokenizer": counts[OTHER_TOKENIZER], "other_weights": counts[OTHER_WEIGHTS],
        "no_ids_kept": counts[NO_IDS],
        "not_clean_or_probe": len(found) - sum(counts.values()) - len(usable), "usable": len(usable),
        "with_intervention": sum(bool(t.receipt.interventions) for t in usable),
    }  # fmt: skip
    (bench.out / "collected.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if found and others == len(found):
        raise UserError(
            f"None of the {len(found)} traces in {traces} comes from {bench.settings.model}",
            got=f"tokenizer {found[0].tokenizer_hash}, weights {found[0].weights or 'unknown'} ({found[0].model})",
            wanted=f"tokenizer {bench.runtime.tokenizer_hash}, weights {own or 'unknown'}",
        )  # fmt: skip
    return usable


def make_pairs(
    bench: Workbench,
    traces: Sequence[Trace],
    prompts: Sequence[Prompt] = (),
    settings: RolloutSettings | None = None,
    backend: Backend | None = None,
) -> list[Pair]:
    """Rolls out and judges, unless `pairs.jsonl` is there already; without a backend on the run's own engine.

    Without settings any pairs that are there will do, and the defaults make new ones.
    """
    path = bench.out / "pairs.jsonl"
    if settings is None and path.exists():
        return read_pairs(path)
    settings = settings or RolloutSettings(seed=bench.settings.seed)

    def harvest() -> Harvest:
        tools = Tools.build(bench.tokenizer, bench.runtime, bench.judge, backend or bench.generator("base"))
        return roll_out(traces, prompts, tools, settings, bench.out)

    return pairs_of(bench, settings, harvest)


def pairs_of(bench: Workbench, settings: RolloutSettings, harvest: Callable[[], Harvest]) -> list[Pair]:
    """The run's pairs: those on disk, or what `harvest` brings, with their card. UserError when those on disk, or what
    was generated for them, were made with other settings."""
    path = bench.out / "pairs.jsonl"
    claim(bench.out / "pairs.settings.json", settings.model_dump_json(indent=1), f"{bench.out} holds other pairs")
    if path.exists():
        return read_pairs(path)
    return publish(harvest(), settings, bench.runtime, bench.judge, bench.out)


def train_adapter(bench: Workbench, pairs: Sequence[Pair], accelerate: Path | None = None) -> TrainReport:
    """Trains the stages, unless the adapter is there already. `accelerate`: see `align.train.train`."""
    return run_stages(bench, pairs, accelerate)


def evaluate_base(
    bench: Workbench, requests: Sequence[EvalRequest]
) -> tuple[dict[str, list[Outcome]], dict[str, Control]]:
    """The arms of the model as it is, and the three-sentence control on what it says to harmful requests.

    Before training it uses the engine that rolled out the pairs; afterwards it reads what is on disk.
    """
    out = bench.out / "evaluation"
    primer = tuple(bench.tokenizer.encode(PRIMER, add_special_tokens=False))
    arms = [
        Arm("base", "base"),
        Arm("base+guard", "base", guard=True),
        Arm("base+primer", "base", opening=primer, one_wording=True),
    ]
    generator = bench.generator("base")
    outcomes = run_arms(
        arms, requests, generator, bench.reader, bench.judge, out, max_tokens=bench.settings.max_tokens
    )  # fmt: skip
    raw = read_results(out / "base.jsonl")
    harmful = [(o, raw[f"base|{o.request.id}"].output_ids) for o in outcomes["base"] if o.request.label == "harmful"]
    controls = run_controls(
        harmful, generator, bench.runtime, bench.tokenizer.backend_tokenizer, bench.reader, bench.judge, out,
        seed=bench.settings.seed,
    )  # fmt: skip
    return outcomes, controls


def evaluate_aligned(bench: Workbench, requests: Sequence[EvalRequest]) -> dict[str, list[Outcome]]:
    """The arms of the trained model, which is merged first."""
    merge(bench.settings.model, bench.out / "adapter", bench.aligned)
    arms = [Arm("aligned", "aligned"), Arm("aligned+guard", "aligned", guard=True)]
    out = bench.out / "evaluation"
    return run_arms(
        arms, requests, bench.generator("aligned"), bench.reader, bench.judge, out, max_tokens=bench.settings.max_tokens
    )  # fmt: skip


def measure(bench: Workbench, requests: Sequence[EvalRequest]) -> Evaluation:
    """Evaluates all arms and the controls, and writes `evaluation.json` with `report.json` and `report.html`."""
    from align.measure import build_report
    from align.report import print_table, write_report

    outcomes, found = evaluate_base(bench, requests)
    outcomes |= evaluate_aligned(bench, requests)
    evaluation = Evaluation(arms={name: summarise(rows) for name, rows in outcomes.items()}, controls=found)
    (bench.out / "evaluation.json").write_text(evaluation.model_dump_json(indent=1), encoding="utf-8")
    result = build_report(bench, outcomes, evaluation)
    write_report(result, bench.out)
    print_table(result, Console())
    return evaluation


def train_and_measure(
    bench: Workbench, pairs: Sequence[Pair], requests: Sequence[EvalRequest], accelerate: Path | None = None
) -> Evaluation:
    """What comes after the pairs; a UserError when there are none, before the long stages begin."""
    if not pairs:
        raise UserError(
            f"There is nothing to train on in {bench.out}", got="no pairs", wanted="traces with interventions",
            fix="collected.json and pairs.json there say what was left out",
        )  # fmt: skip
    evaluate_base(bench, requests)
    train_adapter(bench, pairs, accelerate)
    return measure(bench, requests)


def claim(path: Path, card: str, taken: str) -> None:
    """Writes what a directory is about; UserError where it is about something else."""
    if path.exists() and path.read_text(encoding="utf-8") != card:
        raise UserError(taken, fix="Choose another --out")
    path.write_text(card, encoding="utf-8")
