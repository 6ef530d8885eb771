"""`cli.py csr` and `cli.py triggers`: where reasonings turn, which of their sentences turn them, and what each does."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from align.csr_run import Reasoning
    from align.pipeline import Workbench
    from align.trigger_rank import RankReport, RankSettings

triggers_app = typer.Typer(
    no_args_is_help=True, help="Find new triggers in a model's own reasoning, and measure what each trigger does."
)

Traces = Annotated[Path, typer.Option(help="Directory that `serve` writes traces to.")]
Model = Annotated[str, typer.Option(help="Model that wrote them; `demo` is the embedded demo reasoner.")]
Out = Annotated[Path, typer.Option(help="Directory of this run; an interrupted run on it goes on where it stopped.")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many traces, a seeded choice.")]
CuesOnly = Annotated[bool, typer.Option("--cues-only", help="Only traces in which the guard saw a cue.")]
PolicyFile = Annotated[Path | None, typer.Option(help="Policy whose step limits and threshold are used.")]
MaxTokens = Annotated[int, typer.Option(min=8, help="Longest continuation, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="What the traces were sampled with.")]


def csr(
    traces: Traces,
    model: Model,
    out: Out,
    mu: Annotated[float, typer.Option(min=0, max=1, help="Ratio from which a reasoning counts as safe.")] = 0.9,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Ratio up to which it counts as unsafe.")] = 0.1,
    window: Annotated[int, typer.Option(min=0, help="Tokens that the ratio must stay there (K).")] = 15,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of a point, at most.")] = 32,
    doubt: Annotated[
        float, typer.Option(help="A point is left when all samples would decide otherwise with at most this chance.")
    ] = 0.06,
    whole: Annotated[bool, typer.Option("--full", help="All samples at every point: no search, no stopping.")] = False,
    every_token: Annotated[bool, typer.Option("--every-token", help="Points after every token, not step.")] = False,
    limit: Limit = 30,
    cues_only: CuesOnly = False,
    max_tokens: MaxTokens = 160,
    temperature: Temperature = 0.6,
    policy: PolicyFile = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of sampling.")] = 0,
) -> None:
    """Measure the continuation safety ratio along logged reasonings, and find where they turn.

    Writes OUT/csr.json and OUT/csr.svg. What it costs is told at the end.

    Example: cli.py csr --traces traces/ --model demo --out runs/csr --mu 0.9 --eta 0.1 --window 15
    """
    from pydantic import ValidationError

    from align.csr import CsrRule
    from align.csr_plots import curves
    from align.csr_report import print_report
    from align.csr_run import CsrSettings, engine_spec, measure
    from align.generate import Generator
    from align.pipeline import AlignSettings, Workbench

    try:
        rule = CsrRule(mu=mu, eta=eta, window=window, samples=samples, doubt=doubt)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from error
    settings = CsrSettings(
        rule=rule, whole=whole, at="tokens" if every_token else "steps", max_tokens=max_tokens, temperature=temperature
    )
    with Workbench.open(AlignSettings.of(model, policy, seed), out) as bench:
        reasonings = _reasonings(bench, traces, limit, seed, cues_only=cues_only)
        store = out / f"continuations-{max_tokens}-{temperature:g}.jsonl"
        spec = engine_spec(reasonings, bench.settings.model, max_tokens, seed, store)
        with Generator(spec, out / "engine.log") as generator:
            found = measure(reasonings, bench, settings, generator, store)
        _write(found, out / "csr.json")
        curves(found, out / "csr.svg")
    print_report(found, Console())


@triggers_app.command(name="mine")
def mine_command(
    csr: Annotated[list[Path], typer.Option(help="A `csr.json`; may be given several times.")],
    out: Annotated[Path, typer.Option(help="YAML file for the candidates, for a person to read.")],
) -> None:
    """Propose triggers: the steps at which reasonings turned safe by themselves. Nothing adopts them.

    Example: cli.py triggers mine --csr runs/csr/csr.json --out candidates.yaml
    """
    from align.csr_report import read_report
    from align.trigger_file import write_candidates
    from align.trigger_mine import mine

    candidates, dropped = mine([read_report(path) for path in csr])
    write_candidates(candidates, out)
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "none"
    typer.echo(f"{len(candidates)} candidates in {out}; left out: {reasons}")


@triggers_app.command(name="rank")
def rank_command(
    traces: Traces,
    model: Model,
    out: Out,
    candidates: Annotated[Path | None, typer.Option(help="File of `triggers mine`: measured beside the pool.")] = None,
    limit: Limit = 30,
    max_tokens: MaxTokens = 160,
    temperature: Temperature = 0.6,
    policy: PolicyFile = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of sampling.")] = 0,
) -> None:
    """Measure what follows each trigger in the first cue's place, after it and later; the neutral sentence always too.

    Writes OUT/triggers.json and OUT/triggers.svg.

    Example: cli.py triggers rank --traces traces/ --model demo --out runs/triggers --candidates candidates.yaml
    """
    from align.csr_plots import effects
    from align.pipeline import AlignSettings, Workbench
    from align.trigger_rank import RankSettings, print_ranks

    settings = RankSettings(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with Workbench.open(AlignSettings.of(model, policy, seed), out) as bench:
        cases = _reasonings(bench, traces, limit, seed, cues_only=True)
        found = _rank(bench, cases, candidates, settings, out)
        _write(found, out / "triggers.json")
        effects(found, out / "triggers.svg")
    print_ranks(found, Console())


def _rank(
    bench: Workbench, cases: list[Reasoning], candidates: Path | None, settings: RankSettings, out: Path
) -> RankReport:
    from align.csr_run import engine_spec
    from align.generate import Generator
    from align.trigger_file import read_candidates
    from align.trigger_rank import rank
    from guard.triggers import NEUTRAL, encode_trigger

    tokenizer = bench.tokenizer.backend_tokenizer
    more = [] if candidates is None else [encode_trigger(c.trigger, tokenizer) for c in read_candidates(candidates)]
    neutral = encode_trigger(NEUTRAL, tokenizer)
    store = out / f"continuations-{settings.max_tokens}-{settings.temperature:g}.jsonl"
    longest = max(len(trigger.spaced) for trigger in [*bench.runtime.triggers, *more, neutral])
    # The place `later` lies inside a continuation.
    spec = engine_spec(cases, bench.settings.model, 2 * settings.max_tokens + longest, settings.seed, store)
    with Generator(spec, out / "engine.log") as generator:
        return rank(cases, more, neutral, bench, generator, store, settings)


def _reasonings(bench: Workbench, traces: Path, limit: int, seed: int, *, cues_only: bool) -> list[Reasoning]:
    from align.csr_run import Reasoning
    from align.pipeline import collect
    from guard.errors import UserError

    usable = collect(bench, traces)
    wanted = [t for t in usable if t.output_ids and (not cues_only or any(step.cue for step in t.steps))]
    if not wanted:
        raise UserError(
            f"No trace in {traces} can be used", got=f"{len(usable)} clean traces of {bench.settings.model}",
            wanted="traces with a cue" if cues_only else "traces with an output",
        )  # fmt: skip
    chosen = random.Random(seed).sample(wanted, min(limit, len(wanted)))
    return [Reasoning.of(trace, bench.runtime) for trace in chosen]


def _write(report: BaseModel, path: Path) -> None:
    """Writes the report whole or not at all."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
