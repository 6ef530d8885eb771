"""Baselines that are trained on the same pairs: what a practitioner would try before intervened preference.

`sft` learns the chosen sides by heart: no rejected side, every token after the divergence. `full-dpo` is plain DPO on
everything after the divergence, answer included, without an SFT term; the shared prefix inside both sides would change
nothing, since under the sigmoid loss its log-ratio cancels (docs/paper.md). `full-dpo-norm` has the prefix inside,
where it counts: each side's log-ratio is divided by its length, as in Tulu 3 (arXiv 2411.15124, which has this beta).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.arms import measured
from align.claims import check
from align.evaluate import Arm, EvalRequest, Outcome, arm_jobs
from align.generate import answers
from align.pairs import Pair
from align.quality import Attempt, attempt, task_jobs
from align.tasks import Task
from align.train import TrainReport, TrainSettings, merge, read_report, train
from guard.errors import UserError

if TYPE_CHECKING:
    from align.pipeline import Workbench

EVERYTHING = {"steps": None, "benign_steps": None}
#: What each changes in the settings of a single stage (`baseline_settings`), trained from the model as it came. Beta 0
#: leaves the SFT term alone.
BASELINES: dict[str, dict[str, Any]] = {
    "sft": {"scope": EVERYTHING, "beta": 0.0, "sft_weight": 1.0},
    "full-dpo": {"scope": EVERYTHING, "sft_weight": 0.0},
    "full-dpo-norm": {"scope": EVERYTHING, "sft_weight": 0.0, "per_token": True, "beta": 5.0},
}


def known_baselines(names: str) -> tuple[str, ...]:
    """The names in a comma-separated list; an unknown one is a UserError."""
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    if unknown := [name for name in found if name not in BASELINES]:
        raise UserError("--baselines", got=unknown[0], wanted=f"names of {', '.join(BASELINES)}")
    return found


def baseline_settings(recipe: Sequence[TrainSettings], name: str) -> TrainSettings:
    """One stage as the run's last, without what is ours in its mix (refusals of a stage before, contrast, other turns)
    and with at most the usual share of benign pairs: a larger one was chosen beside those."""
    own = recipe[-1].model_dump(exclude={"benign", "benign_turns", "contrast"})
    own["benign_share"] = min(own["benign_share"], TrainSettings().benign_share)
    return TrainSettings.model_validate(own | BASELINES[name])


def train_baseline(bench: Workbench, name: str, pairs: Sequence[Pair]) -> TrainReport:
    """Trains it into `OUT/baselines/NAME/adapter`, unless it is there already."""
    adapter = _directory(bench, name) / "adapter"
    settings = baseline_settings(bench.settings.recipe, name)
    report = read_report(adapter)
    if report is not None:
        check(report.settings, settings, f"{adapter} holds another baseline")
    else:
        bench.make_room()
        sides = [with_prefix(pair) for pair in pairs] if settings.per_token else pairs
        report = train(
            bench.settings.model, sides, adapter, settings, bench.reader, bench.runtime.policy.limits
        )  # fmt: skip
    return report


def with_prefix(pair: Pair) -> Pair:
    """The same pair as two whole outputs: what both sides share is part of each."""
    return pair.model_copy(
        update={
            "prefix_ids": [], "chosen_ids": pair.prefix_ids + pair.chosen_ids,
            "rejected_ids": pair.prefix_ids + pair.rejected_ids,
        }
    )  # fmt: skip


def measure_baseline(
    bench: Workbench, name: str, requests: Sequence[EvalRequest], tasks: Sequence[Task]
) -> tuple[list[Outcome], list[Attempt]]:
    """Its replies to requests and tasks. The merged weights stay only while they are needed; the adapter stays."""
    out = bench.out / "evaluation"
    arm, merged = Arm(name, name), Path(bench.weights(name))
    asked = {
        f"{name}.jsonl": arm_jobs([arm], requests, bench.settings.max_tokens),
        f"tasks-{name}.jsonl": task_jobs(bench, [arm], tasks),
    }  # fmt: skip
    if any(len(answers(out / file, jobs)) < len(jobs) for file, jobs in asked.items()):
        merge(bench.settings.model, _directory(bench, name) / "adapter", merged)
    outcomes = measured(bench, [arm], requests)[name]
    tried = attempt(bench, [arm], tasks)[name]
    shutil.rmtree(merged, ignore_errors=True)
    return outcomes, tried


def _directory(bench: Workbench, name: str) -> Path:
    return bench.out / "baselines" / name
