"""A weekly run takes over the base model's replies of an earlier one, where nothing about them has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from align.arms import base_arms
from align.claims import Parts
from align.evaluate import EvalRequest, arm_jobs, generate_traced
from align.generate import Job, Result, read_results
from align.inherit import Inherited, inherit
from align.pipeline import AlignSettings, Workbench
from guard.policy import Policy
from guard.traces import Spool, read_traces
from tests.guard.sidecar.scripted import trace_of

REQUESTS = [
    EvalRequest(id=name, topic=name, label="harmful", request=name, prompt_ids=[1, 2, number])
    for number, name in enumerate(("a", "b"))
]
Open = Callable[..., Workbench]


def jobs(bench: Workbench) -> list[Job]:
    return arm_jobs(base_arms(bench), REQUESTS, bench.settings.max_tokens)


@pytest.fixture
def week(tiny_model: Path, tmp_path: Path) -> Open:
    """A run of the tiny model by its name; what it needs of its workbench outlives the lock."""

    def opened(name: str, **settings: int) -> Workbench:
        with Workbench.open(AlignSettings(model=str(tiny_model), **settings), tmp_path / name) as bench:
            return bench

    return opened


@pytest.fixture
def earlier(week: Open) -> Path:
    """A run that measured the base model; its spool holds a trace of the trained model too."""
    bench = week("week-1")
    evaluation = bench.out / "evaluation"
    evaluation.mkdir()
    rows = [Result(id=job.id, job=job.key, output_ids=[7, i], finish="stop") for i, job in enumerate(jobs(bench))]
    (evaluation / "base.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    (evaluation / "controls.jsonl").write_text("{}\n")
    spool = Spool(evaluation / "spool")
    for name in [*(job.guard_id for job in jobs(bench) if job.guard), "aligned+guard|a@0123"]:
        spool.append(trace_of(name, Policy()))
    return bench.out


def test_nothing_is_generated_that_is_known(earlier: Path, week: Open, tmp_path: Path) -> None:
    bench = week("week-2")
    known = inherit(bench, REQUESTS, [tmp_path / "deleted", earlier])
    assert known == Inherited(run=str(earlier), replies=6)
    evaluation = bench.out / "evaluation"
    # An engine would be started for a job that is missing: `_worker` stays None.
    generator = bench.generator("base")
    results, traces = generate_traced(jobs(bench), generator, evaluation / "base.jsonl", "base")
    assert generator._worker is None
    assert [result.output_ids for result in results.values()] == [[7, n] for n in range(6)]
    assert sorted(traces) == ["base+guard|a", "base+guard|b"]
    guarded = sorted(job.guard_id for job in jobs(bench) if job.guard)
    assert sorted(trace.guard_id for trace in read_traces(evaluation / "spool")[0]) == guarded
    assert (evaluation / "controls.jsonl").read_text() == "{}\n"
    # Once more (the run was interrupted), and by a run after it: the replies are still the first one's.
    assert inherit(bench, REQUESTS, []) == known
    assert inherit(week("week-3"), REQUESTS, [bench.out]) == known
    # A card of another version of the program is no card, and no reason to stop.
    (bench.out / "inherited.json").write_text("{}")
    assert inherit(week("week-4"), REQUESTS, [bench.out]) == Inherited(run=str(bench.out), replies=6)


def test_replies_to_other_requests_or_of_another_length_are_not_taken(earlier: Path, week: Open) -> None:
    new = REQUESTS[1].model_copy(update={"id": "c", "topic": "c", "prompt_ids": [1, 2, 9]})
    bench = week("week-2")
    assert inherit(bench, [REQUESTS[0], new], [earlier]) == Inherited(run=str(earlier), replies=3)
    held = read_results(bench.out / "evaluation" / "base.jsonl")
    assert sorted(held) == ["base+guard|a", "base+primer|a", "base|a"]
    assert inherit(week("week-3"), [new], [earlier]) is None
    assert inherit(week("week-4", max_tokens=161), REQUESTS, [earlier]) is None


@pytest.mark.parametrize("part", ["weights", "policy", "detector", "judge", "tokenizer"])
def test_other_parts_are_another_measurement(part: str, earlier: Path, week: Open) -> None:
    card = earlier / "parts.json"
    held = Parts.model_validate_json(card.read_text())
    card.write_text(held.model_copy(update={part: "another"}).model_dump_json())
    bench = week("week-2")
    assert inherit(bench, REQUESTS, [earlier]) is None
    assert not (bench.out / "evaluation").exists()


def test_what_cannot_be_known_is_not_taken(earlier: Path, week: Open) -> None:
    bench, card = week("week-2"), earlier / "parts.json"
    held = json.loads(card.read_text())
    card.write_text(json.dumps(held | {"of another version": 1}))
    assert inherit(bench, REQUESTS, [earlier]) is None
    for run in (earlier, bench.out):
        (run / "parts.json").write_text(json.dumps(held | {"weights": ""}))
    assert inherit(bench, REQUESTS, [earlier]) is None


def test_a_run_keeps_its_own_replies_and_needs_traces_beside_those_of_another(earlier: Path, week: Open) -> None:
    bench = week("week-2")
    own = bench.out / "evaluation" / "base.jsonl"
    own.parent.mkdir()
    own.write_text("")
    assert inherit(bench, REQUESTS, [earlier]) is None
    assert own.read_text() == ""
    own.unlink()
    shutil.rmtree(earlier / "evaluation" / "spool")
    assert inherit(bench, REQUESTS, [earlier]) is None
