"""Studies: seeds pooled, and the report's further changes, goals and tables by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from align.controls import Control
from align.evaluate import relative_drop
from align.quality import Attempt
from align.study import SeedRun, directory, pool, seeded
from align.study_report import changes_of, goals_of, grids_of, second_grids
from align.tasks import built_in
from classifiers.judge import Judgement
from classifiers.stats import Rate
from tests.align.outcomes import outcome

TASKS = built_in(8)


def run(seed: int, safe: int) -> SeedRun:
    """Ten harmful topics, `safe` of which the trained model has become harmless on, and two benign ones."""
    harmful = [f"h{i}" for i in range(10)]
    benign = [outcome("b0", "benign"), outcome("b1", "alarming")]
    base = [outcome(t, thought=True, said=True) for t in harmful] + benign
    guarded = [outcome(t, thought=i < 2, interventions=1, waits=20) for i, t in enumerate(harmful)] + benign
    aligned = [outcome(t, thought=i >= safe, said=i >= safe) for i, t in enumerate(harmful)]
    aligned += [outcome("b0", "benign"), outcome("b1", "alarming", refuses=True)]
    attempts = {
        arm: [Attempt(task, solved=i < solved, answered=i < 2) for i, task in enumerate(TASKS)]
        for arm, solved in (("base", 4), ("aligned", 3))
    }
    seen = {"base": [True] * 10 + [False] * 2, "aligned": [i >= safe for i in range(10)] + [False] * 2}
    half = Rate.of(5, 10)
    outcomes = {"base": base, "base+guard": guarded, "aligned": aligned}
    controls = {"cue": Control(reasoning_harm=half, refusal=half)}
    return SeedRun([seed], outcomes, controls, attempts, [base[:10], guarded[:10]], seen)


def test_seeds_are_pooled_by_topic() -> None:
    runs = [run(0, 9), run(1, 10), run(2, 8)]
    pooled = pool(runs)
    assert pool(runs[:1]) is runs[0]
    assert pooled.seeds == [0, 1, 2]
    assert {arm: len(rows) for arm, rows in pooled.outcomes.items()} == {"base": 36, "base+guard": 36, "aligned": 36}
    assert len({o.request.id for o in pooled.outcomes["base"]}) == 36
    assert {o.request.topic for o in pooled.outcomes["base"]} == {o.request.topic for o in runs[0].outcomes["base"]}
    drop = relative_drop(pooled.outcomes["base"], pooled.outcomes["aligned"], "reasoning_harm")
    assert (drop.rate, drop.n) == (pytest.approx(0.9), 30)
    assert (pooled.controls["cue"].reasoning_harm, len(pooled.attempts["base"])) == (Rate.of(15, 30), 24)
    assert [len(rows) for rows in pooled.rounds] == [30, 30]
    assert len(pooled.seen["aligned"]) == 36


def test_changes_and_goals() -> None:
    pooled = pool([run(0, 9), run(1, 9)])
    changes = changes_of(pooled)
    assert {name: rate.rate for name, rate in changes.items() if name.startswith("aligned")} == {
        "aligned: reasoning harm, relative drop": pytest.approx(0.9),
        "aligned: answer harm, relative drop": pytest.approx(0.9),
        "aligned: ordinary refusals, points": 0.0,
        "aligned: alarming refusals, points": 1.0,
        "aligned: alarming requests answered without harm, points": -1.0,
        "aligned: reasoning tasks solved, points": -0.125,
        "aligned: tasks answered right, points": 0.0,
    }
    met = {goal.name: goal.met for goal in goals_of(changes)}
    assert met == {
        "aligned: reasoning harm, relative drop": True, "aligned: answer harm, relative drop": True,
        "aligned: ordinary refusals, points": True, "aligned: alarming refusals, points": False,
        "aligned: reasoning tasks solved, points": False, "aligned: tasks answered right, points": True,
    }  # fmt: skip


class Stern:
    """Finds every reasoning harmful, and gives no verdict on benign requests' replies."""

    version = "stern"

    def judge(self, rows: Sequence[tuple[str, str, str]]) -> list[Judgement | None]:
        return [Judgement(1.0, 0.0, 0.0) if i % 12 < 10 else None for i, _ in enumerate(rows)]


def test_further_tables() -> None:
    runs = [run(0, 9), run(1, 10)]
    grids = grids_of(runs, pool(runs)) | second_grids(pool(runs), Stern())
    assert list(grids) == [
        "wait_tokens", "detector_judge_gap", "tasks", "tasks_by_kind", "seeds", "second_judge", "judge_agreement",
        "detector_second_judge_gap",
    ]  # fmt: skip
    waits = grids["wait_tokens"].rows["base+guard"]
    assert [getattr(w, "rate", None) for w in waits] == [20.0, 0.0]
    assert [grids["seeds"].rows[f"aligned, seed {s}"][0] for s in (0, 1)] == [Rate.of(1, 10), Rate.of(0, 10)]
    assert grids["tasks"].rows["base"][1] == ""
    second = grids["second_judge"].rows["aligned"]
    assert (getattr(second[0], "rate", None), getattr(second[2], "n", None), second[4]) == (1.0, 0, 4.0)
    assert getattr(grids["judge_agreement"].rows["reasoning harm"][1], "n", None) == 60
    gap = grids["detector_second_judge_gap"].rows
    # The second judge sees harm in all; the detector in all of the base's, in one of twenty after training.
    assert [getattr(c, "rate", None) for c in gap["aligned"][:4]] == [0.05, 1.0, pytest.approx(-0.95), 0.95]
    assert getattr(gap["aligned - base"][2], "rate", None) == pytest.approx(-0.95)
    assert "seeds" not in grids_of(runs[:1], runs[0])


def test_where_a_seed_lies_and_what_it_sets() -> None:
    from align.pipeline import AlignSettings

    out = Path("runs/x")
    assert directory(out, 3, (3,)) == out
    assert directory(out, 3, (3, 4)) == out / "seed-3"
    settings = seeded(AlignSettings(model="m"), 7)
    assert (settings.seed, settings.recipe[0].seed) == (7, 7)
