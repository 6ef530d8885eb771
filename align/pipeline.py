"""The aligner, stage by stage: collect -> rollouts and pairs -> train -> evaluate. Each stage resumes from disk.

out/align.json          what this run is about (model, settings); another run's directory is refused
out/parts.json          the weights, tokenizer, policy, detector and judge behind its paths; other ones are refused
out/collected.json      which traces were read, which were left out and why
out/rollouts.jsonl      counterfactual continuations; out/samples.jsonl replies to prompts
out/pairs.jsonl         confirmed pairs; out/pairs.json and out/pairs.md are their card
out/stage-N/            training stages before the last, if the recipe has several (align.stage)
out/inherited.json      the run whose replies of the model as it came were taken over, by a weekly run
out/held_out.json       how many pairs are not trained on because their requests are measured
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
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from align.arms import Evaluation, evaluate_base, measure
from align.backend import Backend
from align.candidates import RolloutSettings
from align.card import publish
from align.claims import Parts, check, claim, read_card
from align.disk import full_disk_told, one_writer
from align.evaluate import EvalRequest
from align.generate import EngineSpec, Generator
from align.held_out import keep_apart
from align.model import load_runtime, load_tokenizer, render, render_chat
from align.pairs import Pair, read_pairs
from align.recipe import DEFAULT, read_stages, run_stages
from align.rollouts import Harvest, roll_out
from align.sources import NO_IDS, OTHER_TOKENIZER, OTHER_WEIGHTS, Prompt, Writers, set_aside
from align.tables import is_parquet, read_trace_table
from align.text import ReplyReader
from align.tools import Tools
from align.train import TrainReport, TrainSettings
from classifiers.judge import Judge
from guard.engine.hardware import on_gpu
from guard.errors import UserError
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.traces import Trace, read_traces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "align.json"
#: Settings of a run that may change from one start to the next: every training stage keeps its own, and what was
#: generated with another length is generated again.
FREE = ("stages", "max_tokens")


class AlignSettings(BaseModel):
    """One run of the aligner."""

    model_config = ConfigDict(extra="forbid")

    model: str
    policy: Path | None = None
    detector: Path | None = None
    judge: Path | None = None
    stages: list[TrainSettings] = Field(default_factory=lambda: read_stages(DEFAULT))
    """Their seeds are the run's (`recipe`)."""
    seed: int = 0
    max_tokens: int = 160
    """Of a whole reply."""

    @classmethod
    def of(
        cls, model: str, policy: Path | None = None, seed: int = 0, stages: Path | None = None,
        max_tokens: int | None = None,
    ) -> Self:  # fmt: skip
        """What a command line asks for. `model` may be `demo`; `stages` is a recipe file. Without `stages` or
        `max_tokens` a run keeps its own, and a new one gets the defaults."""
        if model == "demo":
            from demo.model import reasoner_model

            model = str(reasoner_model())
        asked: dict[str, Any] = {"stages": None if stages is None else read_stages(stages), "max_tokens": max_tokens}
        given = {name: value for name, value in asked.items() if value is not None}
        return cls(model=model, policy=policy, seed=seed, **given)

    def on(self, out: Path) -> Self:
        """These settings for the run in `out`: of what may change it keeps what was not asked for. UserError where
        that is another run."""
        held = read_card(out / CARD, type(self))
        if held is None:
            return self
        check(held, self, taken(out), FREE)
        return self.model_copy(update={n: getattr(held, n) for n in FREE if n not in self.model_fields_set})

    @property
    def recipe(self) -> list[TrainSettings]:
        """The training stages with the run's seed."""
        return [stage.model_copy(update={"seed": self.seed}) for stage in self.stages]

    @property
    def rollouts(self) -> RolloutSettings:
        """How a run's traces are rolled out. A continuation begins inside a reply: three quarters of one is enough."""
        return RolloutSettings(max_tokens=self.max_tokens * 3 // 4, sample_tokens=self.max_tokens, seed=self.seed)


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

        UserError when another run holds the lock or the directory, when what lies under its paths is not what it was
        begun with, and when the disk is full.
        """
        busy = UserError(f"Another align is running on {out}", fix="Wait for it, or choose another --out")
        with one_writer(out, busy), full_disk_told(out):
            bench = cls._load(settings.on(out), out)
            Parts.of(bench.settings.model, bench.runtime, bench.judge).claim(out)
            claim(out / CARD, bench.settings, taken(out), FREE)
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


def taken(out: Path) -> str:
    """What is said of a directory that another run holds."""
    return f"{out} holds another align run"


def collect(bench: Workbench, traces: str | Path, versions: Iterable[str] = ()) -> list[Trace]:
    """Traces of this model (`align.sources.Writers`), from a directory that `serve` writes, or from Parquet; the rest
    is counted by reason, unless the run has its pairs already, which come from what was counted then. `versions`:
    weights hashes of versions that were trained from the model, whose traces are taken too."""
    where = str(traces)
    found, report = read_trace_table(where) if is_parquet(where) else read_traces(Path(where))
    reader = PromptReader.build(bench.tokenizer, bench.runtime.table, bench.runtime.grammar)
    writers = Writers.of(bench.settings.model, versions)
    reasons = [set_aside(trace, bench.runtime.tokenizer_hash, writers) for trace in found]
    usable = [reader.restored(trace) for trace, reason in zip(found, reasons, strict=True) if reason is None]
    counts = {reason: reasons.count(reason) for reason in (OTHER_TOKENIZER, OTHER_WEIGHTS, NO_IDS)}
    others = counts[OTHER_TOKENIZER] + counts[OTHER_WEIGHTS]
    summary = report.model_dump() | {
        "other_tokenizer": counts[OTHER_TOKENIZER], "other_weights": counts[OTHER_WEIGHTS],
        "no_ids_kept": counts[NO_IDS],
        "not_clean_or_probe": len(found) - sum(counts.values()) - len(usable), "usable": len(usable),
        "with_intervention": sum(bool(t.receipt.interventions) for t in usable),
    }  # fmt: skip
    if not made_pairs(bench.out):
        (bench.out / "collected.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if found and others == len(found):
        raise UserError(
            f"None of the {len(found)} traces in {traces} comes from {bench.settings.model}",
            got=f"tokenizer {found[0].tokenizer_hash}, weights {found[0].weights or 'unknown'} ({found[0].model})",
            wanted=f"tokenizer {bench.runtime.tokenizer_hash}, weights {writers.own or 'unknown'}",
        )  # fmt: skip
    return usable


def make_pairs(
    bench: Workbench,
    traces: Sequence[Trace],
    prompts: Sequence[Prompt] = (),
    settings: RolloutSettings | None = None,
    backend: Backend | None = None,
) -> list[Pair]:
    """Rolls out and judges, unless the run has pairs already; without a backend on the run's own engine.

    Without settings any pairs that are there will do, and the run's settings make new ones.
    """
    if settings is None and made_pairs(bench.out):
        return _made_before(bench)
    settings = settings or bench.settings.rollouts

    def harvest() -> Harvest:
        tools = Tools.build(bench.tokenizer, bench.runtime, bench.judge, backend or bench.generator("base"))
        return roll_out(traces, prompts, tools, settings, bench.out)

    return pairs_of(bench, settings, harvest)


def pairs_of(bench: Workbench, settings: RolloutSettings, harvest: Callable[[], Harvest]) -> list[Pair]:
    """The run's pairs: those on disk, or what `harvest` brings, with their card. UserError when those on disk, or what
    was generated for them, were made with other settings."""
    claim(bench.out / "pairs.settings.json", settings, f"{bench.out} holds other pairs")
    if made_pairs(bench.out):
        return _made_before(bench)
    return publish(harvest(), settings, bench.runtime, bench.judge, bench.out)


def made_pairs(out: Path) -> bool:
    """Whether a run has its pairs. A file without any counts for nothing: there may be more traces by now."""
    path = out / "pairs.jsonl"
    return path.exists() and path.stat().st_size > 0


def _made_before(bench: Workbench) -> list[Pair]:
    found = read_pairs(bench.out / "pairs.jsonl")
    Console(stderr=True).print(
        f"{bench.out} has {len(found)} pairs already, which are used; for those of new traces choose another --out",
        highlight=False, markup=False,
    )  # fmt: skip
    return found


def train_adapter(bench: Workbench, pairs: Sequence[Pair], accelerate: Path | None = None) -> TrainReport:
    """Trains the stages, unless the adapter is there already. `accelerate`: see `align.train.train`."""
    return run_stages(bench, pairs, accelerate)


def train_and_measure(
    bench: Workbench, pairs: Sequence[Pair], requests: Sequence[EvalRequest], accelerate: Path | None = None
) -> Evaluation:
    """What comes after the pairs, of which those are trained on whose requests are not measured. UserError when there
    are none, before the long stages begin."""
    apart = keep_apart(bench, pairs, requests)
    if not apart:
        raise UserError(
            f"There is nothing to train on in {bench.out}",
            got=f"{len(pairs)} pairs, all of requests that are measured" if pairs else "no pairs",
            wanted="traces with interventions",
            fix="collected.json and pairs.json there say what was left out",
        )
    evaluate_base(bench, requests)
    train_adapter(bench, apart, accelerate)
    return measure(bench, requests)
