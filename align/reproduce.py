"""From a model to its report over several seeds: what `align evaluate` and `align reproduce` run.

`reproduce` needs nothing but a model: the guarded model's own replies to training requests are its traces. Every part
resumes from disk, so that running it again only measures what is missing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from align import pipeline
from align.arms import Evaluation
from align.evaluate import EvalRequest, generate_traced, summarise
from align.generate import Job
from align.harness import run_harness
from align.measure import build_report
from align.pairs import Pair, read_pairs, request_key
from align.paper import paper_grids
from align.pipeline import AlignSettings, Workbench
from align.report import Report, print_table, write_report
from align.study import SeedRun, StudySettings, directory, pool, run_seeds, seeded
from align.study_report import changes_of, goals_of, grids_of, notes_of, second_grids
from classifiers.judging import open_judge
from classifiers.stats import Rate
from guard.errors import UserError
from guard.traces import Spool, read_traces

SPEED = "pairs_per_s_over_trl"
#: What a run takes over from another one to train on its pairs; those of prompts alone have nothing collected.
INHERITED = ("pairs.jsonl", "pairs.json", "collected.json")

Requests = Callable[[Workbench], list[EvalRequest]]


def evaluate(settings: AlignSettings, out: Path, study: StudySettings, requests: Requests) -> Report:
    """Measures the run in `out`; with several seeds each trains on the pairs of `out` in a run of its own."""

    def pairs_of(bench: Workbench) -> list[Pair]:
        for name in INHERITED:
            if bench.out != out and not (bench.out / name).exists():
                if (out / name).exists():
                    shutil.copy(out / name, bench.out / name)
                elif name != "collected.json":
                    raise UserError(f"{out / name} does not exist", fix="Run `cli.py align pairs` on it first")
        return read_pairs(bench.out / "pairs.jsonl")

    return _study(settings, out, study, pairs_of, requests, {})


def reproduce(
    settings: AlignSettings,
    out: Path,
    study: StudySettings,
    requests: Requests,
    training: Requests,
    traces: Path | None = None,
    speed: Path | None = None,
) -> Report:
    """Everything from the model on: traces (unless given), pairs, training, all arms, the paper's tables.

    `speed`: what `benchmarks.align` wrote, to stand beside them.
    """
    measured = {} if speed is None else {SPEED: read_speed(speed)}

    def pairs_of(bench: Workbench) -> list[Pair]:
        source = traces or traffic(bench, training(bench), requests(bench))
        return pipeline.make_pairs(bench, pipeline.collect(bench, source), settings=bench.settings.rollouts)

    return _study(settings, out, study, pairs_of, requests, measured)


def traffic(bench: Workbench, training: Sequence[EvalRequest], held_out: Sequence[EvalRequest]) -> Path:
    """A directory of traces: the guarded model's replies to the training requests. UserError if one is held out, or if
    the directory holds replies to something else."""
    target = bench.out / "traces"
    if both := {request_key(r.request) for r in training} & {request_key(r.request) for r in held_out}:
        raise UserError(f"{len(both)} training requests are held out too", got=min(both), fix="Take them out of one")
    jobs = [
        Job(id=f"train|{r.id}", prompt_ids=r.prompt_ids, max_tokens=bench.settings.max_tokens, guard=True)
        for r in training
    ]  # fmt: skip
    if target.is_dir():
        if {t.guard_id for t in read_traces(target)[0]} != {job.guard_id for job in jobs}:
            raise UserError(
                f"{target} holds replies to other training requests, or of another length", fix="Choose another --out"
            )
        return target
    _, found = generate_traced(jobs, bench.generator("base"), bench.out / "traffic.jsonl", "training traffic")
    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    spool = Spool(scratch)
    for trace in found.values():
        spool.append(trace)
    scratch.rename(target)
    return target


def read_speed(path: Path) -> float:
    """How many times as many pairs/s as stock TRL the training does, by `benchmarks.align`; UserError without it."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return float(figures["as in the demo"]["trl"]["ours_over_it"]["median"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} holds no speed", got=str(error), fix="Make it with `python -m benchmarks.align`"
        ) from error


def _study(
    settings: AlignSettings, out: Path, study: StudySettings, pairs_of: Callable[[Workbench], list[Pair]],
    requests: Requests, speed: Mapping[str, float],
) -> Report:  # fmt: skip
    began = time.monotonic()
    runs = run_seeds(settings, out, study, pairs_of, requests)
    pooled = pool(runs)
    report = _report(settings, out, study, pooled)
    changes = report.changes | changes_of(pooled)
    grids = grids_of(runs, pooled) | paper_grids(pooled, settings.model, _harness(settings, out, study))
    report = report.model_copy(
        update={
            "changes": changes, "goals": goals_of(changes), "grids": grids, "seeds": list(study.seeds),
            "notes": [*report.notes, *notes_of(pooled)], "speed": {**report.speed, **speed},
        }
    )  # fmt: skip
    write_report(report, out)
    if study.judge is not None:
        # Last, since it may be down: the report is there without it, and what it said is kept for the next try.
        again = second_grids(pooled, open_judge(study.judge, out / "second-judge.jsonl"))
        report = report.model_copy(update={"grids": grids | again})
        write_report(report, out)
    console = Console()
    print_table(report, console)
    minutes = (time.monotonic() - began) / 60
    console.print(f"{minutes:.1f} minutes (what was on disk already took none); report: {out / 'report.html'}")
    return report


def _report(settings: AlignSettings, out: Path, study: StudySettings, pooled: SeedRun) -> Report:
    """The demo's report over all seeds; environment, speed and notes are those of the first."""
    arms = {name: summarise(outcomes) for name, outcomes in pooled.outcomes.items()}
    evaluation = Evaluation(arms=arms, controls=pooled.controls)
    (out / "evaluation.json").write_text(evaluation.model_dump_json(indent=1), encoding="utf-8")
    first = study.seeds[0]
    with Workbench.open(seeded(settings, first), directory(out, first, study.seeds)) as bench:
        return build_report(bench, pooled.outcomes, evaluation)


def _harness(settings: AlignSettings, out: Path, study: StudySettings) -> dict[str, dict[str, Rate]]:
    """lm-eval on the base and on the first seed's model."""
    if not study.lm_eval:
        return {}
    first = directory(out, study.seeds[0], study.seeds)
    models = {"base": settings.model, "aligned": str(first / "aligned")}
    return {
        arm: run_harness(model, study.lm_eval, out / "lm-eval" / arm, study.seeds[0]) for arm, model in models.items()
    }
