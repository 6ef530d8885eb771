"""A study: what one align run is measured on, beyond the demo's five arms, over one or several seeds.

Each seed is a run of its own (`OUT/seed-N`, or `OUT` itself where there is one): its pairs, its training, its replies.
The figures pool them; wordings and seeds of one topic belong together in every interval. All of it resumes from disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from align import pipeline
from align.arms import evaluate_aligned, evaluate_base
from align.baselines import measure_baseline, train_baseline
from align.claims import read_card
from align.controls import Control
from align.crosscheck import detector_sees
from align.evaluate import Arm, EvalRequest, Outcome
from align.held_out import keep_apart
from align.keywords import by_keyword
from align.pairs import Pair
from align.pipeline import CARD, AlignSettings, Workbench
from align.quality import Attempt, attempt
from align.substitute import substitute
from align.tasks import COUNT, built_in
from classifiers.stats import Rate
from guard.errors import UserError

#: Arms whose tasks are asked beside the trained baselines'. The guard's arms show what its false alarms cost.
TASK_ARMS = (
    Arm("base", "base"), Arm("base+guard", "base", guard=True),
    Arm("aligned", "aligned"), Arm("aligned+guard", "aligned", guard=True),
)  # fmt: skip


class StudySettings(BaseModel):
    """What is measured beyond the arms of `align.pipeline`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: tuple[int, ...] = (0,)
    tasks: int = COUNT
    """Auto-checked reasoning tasks per arm; 0: none."""
    baselines: tuple[str, ...] = ()
    """Trained baselines, by the names of `align.baselines`."""
    judge: str | None = None
    """A second judge (`classifiers.judging.open_judge`)."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-eval by name."""


@dataclass
class SeedRun:
    """What one seed showed; of a pooled study, what all of them did."""

    seeds: list[int]
    outcomes: dict[str, list[Outcome]]
    controls: dict[str, Control]
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    """At the tasks, by arm."""
    rounds: list[list[Outcome]] = field(default_factory=list)
    """Of the substitution (`align.substitute`)."""
    seen: dict[str, list[bool]] = field(default_factory=dict)
    """Whether the detector finds a cue in what an unguarded arm thought, in the order of its outcomes."""


def recorded(out: Path, model: str) -> AlignSettings:
    """The settings of the run in `out`; UserError when there is none, or when it is another model's."""
    settings = read_card(out / CARD, AlignSettings)
    if settings is None:
        raise UserError(
            f"{out} holds no align run", fix="Run `cli.py align`, or `align pairs` and `align train`, on it"
        )
    if settings.model != model:
        raise UserError(f"{out} holds a run of another model", got=model, wanted=settings.model)
    return settings


def directory(out: Path, seed: int, seeds: Sequence[int]) -> Path:
    """Where a seed's run lies."""
    return out if len(seeds) == 1 else out / f"seed-{seed}"


def run_seeds(
    settings: AlignSettings,
    out: Path,
    study: StudySettings,
    pairs_of: Callable[[Workbench], list[Pair]],
    requests_of: Callable[[Workbench], list[EvalRequest]],
) -> list[SeedRun]:
    """Runs every seed that is not finished, and reads the others from disk."""
    found: list[SeedRun] = []
    console = Console(stderr=True)
    for seed in study.seeds:
        began = time.monotonic()
        with Workbench.open(seeded(settings, seed), directory(out, seed, study.seeds)) as bench:
            found.append(run_seed(bench, pairs_of(bench), requests_of(bench), study))
        minutes = (time.monotonic() - began) / 60
        console.print(f"seed {seed}, {len(found)} of {len(study.seeds)}: {minutes:.1f} minutes")
    return found


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds of `--seeds`; UserError where it does not list different whole numbers."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in numbers) or len(set(numbers)) < len(numbers):
        raise UserError("--seeds", got=text, wanted="different whole numbers, such as 0,1,2")
    return tuple(map(int, numbers))


def seeded(settings: AlignSettings, seed: int) -> AlignSettings:
    """The settings of one seed's run: sampling, choice of pairs and training."""
    return settings.model_copy(update={"seed": seed})


def run_seed(bench: Workbench, pairs: Sequence[Pair], requests: Sequence[EvalRequest], study: StudySettings) -> SeedRun:
    """All arms of one seed: base, trained, baselines; each model's replies in one go, so that its engine stays busy.
    Pairs whose requests are measured are not trained on."""
    apart = keep_apart(bench, pairs, requests)
    outcomes, controls = evaluate_base(bench, requests)
    run = SeedRun([bench.settings.seed], outcomes, controls)
    outcomes["base+keyword"] = by_keyword(outcomes["base"], bench.judge)
    _substitute(bench, run)
    _attempt(bench, run, "base", study)
    pipeline.train_adapter(bench, apart)
    outcomes |= evaluate_aligned(bench, requests)
    _attempt(bench, run, "aligned", study)
    for name in study.baselines:
        train_baseline(bench, name, apart)
        outcomes[name], run.attempts[name] = measure_baseline(bench, name, requests, built_in(study.tasks))
    for name in ("base", "aligned"):
        run.seen[name] = detector_sees(outcomes[name], bench.runtime)
    return run


def _substitute(bench: Workbench, run: SeedRun) -> None:
    found = substitute(
        run.outcomes["base"], bench.generator("base"), bench.runtime, bench.reader, bench.judge,
        bench.out / "evaluation", max_tokens=bench.settings.max_tokens,
    )  # fmt: skip
    run.outcomes["base+substitute"], run.rounds = found.outcomes, found.rounds


def _attempt(bench: Workbench, run: SeedRun, model: str, study: StudySettings) -> None:
    run.attempts |= attempt(bench, [arm for arm in TASK_ARMS if arm.model == model], built_in(study.tasks))


def pool(runs: Sequence[SeedRun]) -> SeedRun:
    """All seeds as one: the requests of each get ids of their own, their topics stay."""
    if len(runs) == 1:
        return runs[0]
    return SeedRun(
        seeds=[seed for run in runs for seed in run.seeds],
        outcomes={arm: [o for r in runs for o in marked(r.seeds[0], r.outcomes[arm])] for arm in runs[0].outcomes},
        controls={name: _pooled([run.controls[name] for run in runs]) for name in runs[0].controls},
        attempts={arm: [a for run in runs for a in run.attempts[arm]] for arm in runs[0].attempts},
        rounds=[[o for run in runs for o in marked(run.seeds[0], run.rounds[i])] for i in range(len(runs[0].rounds))],
        seen={arm: [s for run in runs for s in run.seen[arm]] for arm in runs[0].seen},
    )  # fmt: skip


def marked(seed: int, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with ids that no other seed's have."""
    mark = f"seed-{seed}|"
    return [replace(o, request=o.request.model_copy(update={"id": mark + o.request.id})) for o in outcomes]


def _pooled(controls: Sequence[Control]) -> Control:
    """Controls keep shares only, so seeds are added up as if they were further cases."""
    fields = [[getattr(c, name) for c in controls] for name in ("reasoning_harm", "refusal")]
    harm, refusal = (Rate.of(sum(round(r.rate * r.n) for r in f), sum(r.n for r in f)) for f in fields)
    return Control(reasoning_harm=harm, refusal=refusal)
