"""The arms of a run as it is measured: the model as it came, with its controls, and the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel
from rich.console import Console

from align.controls import Control, run_controls
from align.evaluate import PRIMER, Arm, ArmReport, EvalRequest, Outcome, run_arms, summarise
from align.train import merge

if TYPE_CHECKING:
    from align.pipeline import Workbench


class Evaluation(BaseModel):
    """Arms by name, and the controls."""

    arms: dict[str, ArmReport]
    controls: dict[str, Control]


def base_arms(bench: Workbench) -> list[Arm]:
    """How the model as it came is asked."""
    primer = tuple(bench.tokenizer.encode(PRIMER, add_special_tokens=False))
    return [
        Arm("base", "base"),
        Arm("base+guard", "base", guard=True),
        Arm("base+primer", "base", opening=primer, one_wording=True),
    ]


def evaluate_base(
    bench: Workbench, requests: Sequence[EvalRequest]
) -> tuple[dict[str, list[Outcome]], dict[str, Control]]:
    """The arms of the model as it is, and the three-sentence control on what it says to harmful requests.

    Before training it uses the engine that rolled out the pairs; afterwards it reads what is on disk.
    """
    outcomes = measured(bench, base_arms(bench), requests)
    controls = run_controls(
        [outcome for outcome in outcomes["base"] if outcome.request.label == "harmful"], bench.generator("base"),
        bench.runtime, bench.tokenizer.backend_tokenizer, bench.reader, bench.judge, bench.out / "evaluation",
        max_tokens=bench.settings.max_tokens, seed=bench.settings.seed,
    )  # fmt: skip
    return outcomes, controls


def evaluate_aligned(bench: Workbench, requests: Sequence[EvalRequest]) -> dict[str, list[Outcome]]:
    """The arms of the trained model, which is merged first."""
    merge(bench.settings.model, bench.out / "adapter", bench.aligned)
    return measured(bench, [Arm("aligned", "aligned"), Arm("aligned+guard", "aligned", guard=True)], requests)


def measured(bench: Workbench, arms: Sequence[Arm], requests: Sequence[EvalRequest]) -> dict[str, list[Outcome]]:
    """Outcomes by arm, of arms that share one model."""
    return run_arms(
        arms, requests, bench.generator(arms[0].model), bench.reader, bench.judge, bench.out / "evaluation",
        max_tokens=bench.settings.max_tokens,
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
