"""A weekly run takes over the base model's replies of an earlier one, where nothing about them has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align.claims import Parts
from align.evaluate import Arm, EvalRequest, arm_jobs, generate_traced
from align.generate import Job, Result, read_results
from align.inherit import Inherited, inherit
from align.pipeline import AlignSettings, Workbench
from guard.policy import Policy
from guard.traces import Spool, read_traces
from tests.guard.sidecar.scripted import trace_of

ARMS = [Arm("base", "base"), Arm("base+guard", "base", guard=True)]
REQUESTS = [
    EvalRequest(id=name, topic=name, label="harmful", request=name, prompt_ids=[1, 2, number])
    for number, name in enumerate(("a", "b"))
]


def jobs(max_tokens: int = 8) -> list[Job]:
    return arm_jobs(ARMS, REQUESTS, max_tokens)


@pytest.fixture
def earlier(tiny_model: Path, tmp_path: Path) -> Path:
    """A run that measured the base model; its spool holds a trace of the trained model too."""
    run = tmp_path / "week-1"
    with Workbench.open(AlignSettings(model=str(tiny_model)), run) as bench:
        _answer(bench.out / "evaluation", jobs())
    return run


def _answer(evaluation: Path, asked: list[Job]) -> None:
    evaluation.mkdir(parents=True, exist_ok=True)
    rows = [Result(id=job.id, job=job.key, output_ids=[7, i], finish="stop") for i, job in enumerate(asked)]
    (evaluation / "base.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    (evaluation / "controls.jsonl").write_text("{}\n")
    spool = Spool(evaluation / "spool")
    for name in [*(job.guard_id for job in asked if job.guard), "aligned+guard|a@0123"]:
        spool.append(trace_of(name, Policy()))


def test_nothing_is_generated_that_is_known(earlier: Path, tiny_model: Path, tmp_path: Path) -> None:
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-2") as bench:
        known = inherit(bench, [tmp_path / "deleted", earlier])
        assert known == Inherited(run=str(earlier), replies=4)
        evaluation = bench.out / "evaluation"
        # An engine would be started for a job that is missing: `_worker` stays None.
        generator = bench.generator("base")
        results, traces = generate_traced(jobs(), generator, evaluation / "base.jsonl", "base")
        assert generator._worker is None
        assert [result.output_ids for result in results.values()] == [[7, 0], [7, 1], [7, 2], [7, 3]]
        assert sorted(traces) == ["base+guard|a", "base+guard|b"]
        assert sorted(t.guard_id for t in read_traces(evaluation / "spool")[0]) == sorted(
            job.guard_id for job in jobs() if job.guard
        )
        assert (evaluation / "controls.jsonl").read_text() == "{}\n"
        # Once more (the run was interrupted), and by a run after it: the replies are still the first one's.
        assert inherit(bench, []) == known
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-3") as bench:
        assert inherit(bench, [tmp_path / "week-2"]) == known


def test_a_reply_to_another_job_is_none(earlier: Path, tiny_model: Path, tmp_path: Path) -> None:
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-2") as bench:
        inherit(bench, [earlier])
        held = read_results(bench.out / "evaluation" / "base.jsonl").values()
    assert {row.job for row in held} == {job.key for job in jobs()}
    assert {row.job for row in held}.isdisjoint(job.key for job in jobs(max_tokens=9))


@pytest.mark.parametrize("part", ["weights", "policy", "detector", "judge", "tokenizer"])
def test_other_parts_are_another_measurement(part: str, earlier: Path, tiny_model: Path, tmp_path: Path) -> None:
    card = earlier / "parts.json"
    held = Parts.model_validate_json(card.read_text())
    card.write_text(held.model_copy(update={part: "another"}).model_dump_json())
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-2") as bench:
        assert inherit(bench, [earlier]) is None
        assert not (bench.out / "evaluation" / "base.jsonl").exists()


def test_what_cannot_be_known_is_not_taken(earlier: Path, tiny_model: Path, tmp_path: Path) -> None:
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-2") as bench:
        for run in (earlier, bench.out):
            card = run / "parts.json"
            card.write_text(json.dumps(json.loads(card.read_text()) | {"weights": ""}))
        assert inherit(bench, [earlier]) is None


def test_a_run_keeps_its_own_replies_and_needs_whole_ones(earlier: Path, tiny_model: Path, tmp_path: Path) -> None:
    with Workbench.open(AlignSettings(model=str(tiny_model)), tmp_path / "week-2") as bench:
        evaluation = bench.out / "evaluation"
        evaluation.mkdir()
        (evaluation / "base.jsonl").write_text("")
        assert inherit(bench, [earlier]) is None
        assert (evaluation / "base.jsonl").read_text() == ""
        (evaluation / "base.jsonl").unlink()
        shutil.rmtree(earlier / "evaluation" / "spool")
        assert inherit(bench, [earlier]) is None
