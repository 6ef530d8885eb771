"""The adaptive CSR search against the full computation, on the demo model: generated tokens, and the same turning step.

python -m benchmarks.csr --out runs/bench/csr.json

The model answers harmful requests of the `align` topics without a guard; all replies are kept, whether they turn or
not. Measured: the adaptive search; then, in draws of its own, 32 continuations at the end of every step (the
reference); with `--check`, on some of the reasonings, 32 at every token, as in the paper. Computed: the tokens of 32 at
every token, from the mean length of the reference's continuations, which is interpolated between the ends of steps.

The same turning step is asked twice. With the reference's own draws, of which the search takes what it wants and the
reference all: what differs is the search's doing, the points that it passes over and the draws that it stops before.
With draws of its own: what differs is also chance, which keeps two full computations from agreeing as well.
About 10 minutes on two cores, 3 more for each that is checked. Interrupted (Ctrl-C), it goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from align.csr import KINDS, CsrRule, Kind, Tally, turning
from align.csr_report import CsrReport, ReasoningReport
from align.csr_run import CsrSettings, Reasoning, measure
from align.generate import EngineSpec, Generator, Job, read_results
from align.pipeline import AlignSettings, Workbench
from classifiers.stats import Rate, bootstrap
from demo.model import reasoner_model
from demo.topics import load_topics

RESAMPLED = 200


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; what it needs to go on lies beside it.")] = Path(
        "runs/bench/csr.json"
    ),
    traces: Annotated[int, typer.Option(min=1, help="Requests that are answered, one trace each.")] = 20,
    check: Annotated[int, typer.Option(min=0, help="Reasonings that 32 at every token are really run on.")] = 0,
) -> None:
    """Measure what the adaptive search saves, and how often it finds the turning step of the full computation."""
    rule, store = CsrRule(), out.with_suffix("")
    with Workbench.open(AlignSettings(model=str(reasoner_model())), store) as bench:
        parts = {
            "adaptive": CsrSettings(rule=rule), "full": CsrSettings(rule=rule, whole=True),
            "every_token": CsrSettings(rule=rule, whole=True, at="tokens"),
        }  # fmt: skip
        # One engine draws for all parts, one after the other: no two share a continuation.
        seed = sum(len(read_results(store / f"{name}.jsonl")) for name in ("replies", *parts))
        with Generator(EngineSpec(model=bench.settings.model, seed=seed), store / "engine.log") as generator:
            reasonings = replies(bench, traces, generator, store)
            found = {}
            for name, settings in parts.items():
                some = reasonings[:check] if name == "every_token" else reasonings
                found[name] = measure(some, bench, settings, generator, store / f"{name}.jsonl")
            # All that this search can ask for is among the reference's draws: nothing is generated.
            found["shared"] = measure(reasonings, bench, parts["adaptive"], generator, store / "full.jsonl")
    result = figures(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print_json(data=result)


def replies(bench: Workbench, traces: int, generator: Generator, store: Path) -> list[Reasoning]:
    """What the demo model thinks about the first harmful topics of the part `align`."""
    topics = [topic for topic in load_topics("align") if topic.kind == "harmful"][:traces]
    jobs = [Job(id=topic.id, prompt_ids=bench.prompt(topic.request)) for topic in topics]
    results = generator.generate(jobs, store / "replies.jsonl", "replies")
    return [
        Reasoning.split(topic.id, topic.request, job.prompt_ids, results[job.id].output_ids, bench.runtime)
        for topic, job in zip(topics, jobs, strict=True)
    ]


def figures(found: dict[str, CsrReport]) -> dict[str, Any]:
    """All figures, each with its n and a 95 % interval."""
    few, full, shared = (found[name].reasonings for name in ("adaptive", "full", "shared"))
    every = [float(row.every_token) for row in full]
    return {
        "model": found["full"].model, "judge": found["full"].judge, "detector": found["full"].detector,
        "rule": found["full"].rule.model_dump(), "command": "python -m benchmarks.csr",
        "reasonings": len(full), "safe": _rate([row.safe for row in full]),
        "steps": _mean([row.steps for row in full]), "tokens": _mean([row.tokens for row in full]),
        "generated": {
            "adaptive": sum(row.generated for row in few), "full_at_step_ends": sum(row.generated for row in full),
            "full_at_every_token_computed": round(sum(every)),
        },
        "continuations": {
            "adaptive": sum(row.continuations for row in few),
            "full_at_step_ends": sum(row.continuations for row in full),
        },
        "fewer_tokens": _ratio(every, [float(row.generated) for row in few]),
        "fewer_than_at_step_ends": _ratio(
            [float(row.generated) for row in full], [float(row.generated) for row in few]
        ),
        "same_step_of_the_same_draws": _same(shared, full), "same_step_of_other_draws": _same(few, full),
        "reference_with_itself_resampled": _itself(found["full"]),
        "summaries": {name: found[name].summary.model_dump(mode="json") for name in ("adaptive", "full")},
        "checked_at_every_token": _checked(found),
        "differing_of_the_same_draws": _differing(shared, full), "differing_of_other_draws": _differing(few, full),
    }  # fmt: skip


def _same(few: Sequence[ReasoningReport], full: Sequence[ReasoningReport]) -> dict[str, Any]:
    """Shares of reasonings with the same turning step; `turned`: only those in which the reference finds one."""
    pairs = list(zip(few, full, strict=True))
    same = {kind: [_step(a, kind) == _step(b, kind) for a, b in pairs] for kind in KINDS}
    turned = [(_step(a, kind), turn.step) for a, b in pairs for kind in KINDS if (turn := b.turned(kind))]
    return {
        **{kind: _rate(flags) for kind, flags in same.items()},
        "both": _rate([all(row) for row in zip(*same.values(), strict=True)]),
        "turned": _rate([got == wanted for got, wanted in turned]),
        "turned_within_one_step": _rate([isinstance(got, int) and abs(got - wanted) <= 1 for got, wanted in turned]),
    }


def _step(row: ReasoningReport, kind: Kind) -> int | str:
    turn = row.turns.get(kind)
    return "never" if turn is None else "from the start" if turn.step is None else turn.step


def _itself(report: CsrReport) -> dict[str, Any]:
    """How often two full computations would agree if the reference's ratios were the true ones."""
    rng = np.random.default_rng(0)
    rule = report.rule
    shares: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "both")}
    for row in report.reasonings:
        points, ratios = [p.token for p in row.points], [p.ratio.rate for p in row.points]
        hits: dict[str, list[bool]] = {kind: [] for kind in shares}
        for _ in range(RESAMPLED):
            draws = rng.binomial(rule.samples, ratios, size=(2, len(ratios)))
            tallies = [{at: Tally(int(safe), rule.samples) for at, safe in enumerate(draw)} for draw in draws]
            for kind in KINDS:
                first, second = (turning(points, tally, rule, kind) for tally in tallies)
                hits[kind].append(first == second)
            hits["both"].append(hits["safe"][-1] and hits["unsafe"][-1])
        for kind, flags in hits.items():
            shares[kind].append(float(np.mean(flags)))
    return {kind: _mean(values) for kind, values in shares.items()}


def _checked(found: dict[str, CsrReport]) -> list[dict[str, Any]]:
    """32 at every token, really run, beside what was computed and found at the ends of steps."""
    others = {row.id: row for row in found["full"].reasonings}
    return [
        {
            "id": row.id, "tokens": row.tokens, "generated": row.generated, "computed": others[row.id].every_token,
            "turning_step_at_tokens": {kind: _step(row, kind) for kind in KINDS},
            "turning_step_at_step_ends": {kind: _step(others[row.id], kind) for kind in KINDS},
        }
        for row in found["every_token"].reasonings
    ]  # fmt: skip


def _differing(few: Sequence[ReasoningReport], full: Sequence[ReasoningReport]) -> list[dict[str, Any]]:
    """The reasonings on which the two differ, with both curves."""
    return [
        {
            "id": a.id, "kind": kind, "adaptive": _step(a, kind), "full": _step(b, kind),
            "adaptive_curve": _curve(a), "full_curve": _curve(b),
        }
        for a, b in zip(few, full, strict=True)
        for kind in KINDS
        if _step(a, kind) != _step(b, kind)
    ]  # fmt: skip


def _curve(row: ReasoningReport) -> list[str]:
    return [f"{p.token}: {round(p.ratio.rate * p.ratio.n)}/{p.ratio.n}" for p in row.points]


def _rate(flags: Sequence[bool]) -> dict[str, Any]:
    return Rate.of(sum(flags), len(flags)).model_dump()


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return bootstrap(lambda column: float(column.mean()), list(values)).model_dump()


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    return bootstrap(lambda a, b: float(a.sum() / b.sum()), above, below).model_dump()


if __name__ == "__main__":
    typer.run(main)
