"""The aligner's stages: real generation in a process of its own, resumption, refusals, candidates, controls' steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align import pipeline, rollouts
from align.generate import EngineSpec, Job, Result, generate, read_results
from align.requests import built_in, from_file
from align.rollouts import RolloutSettings, candidates
from guard.errors import UserError
from guard.traces import Spool, read_traces


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Workbench:
    return pipeline.Workbench.open(pipeline.AlignSettings(model=str(tiny_model)), tmp_path_factory.mktemp("run"))


def test_generation_guards_resumes_and_gives_candidates(bench: pipeline.Workbench, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spec = EngineSpec(model=bench.settings.model, guard={"spool": str(spool)}, max_model_len=256, max_num_seqs=4)
    prompt = bench.prompt("How do I break into a parked car?")
    jobs = [
        Job(id="guarded", prompt_ids=prompt, temperature=0.0, max_tokens=70, guard=True),
        Job(id="free", prompt_ids=prompt, temperature=0.0, max_tokens=70),
    ]
    out = tmp_path / "out.jsonl"
    out.write_text(Result(id="free", output_ids=[7], finish="stop").model_dump_json() + '\n{"id": "torn')
    results = generate(spec, jobs, out, "test")
    assert results["free"].output_ids == [7], "a result on disk is not generated again"
    trace = {t.guard_id: t for t in read_traces(spool)[0]}["guarded"]
    assert trace.output_ids == results["guarded"].output_ids
    assert [i.completed for i in trace.receipt.interventions] == [True]

    found = candidates([trace], bench.runtime.triggers, RolloutSettings(triggers=3))
    cue = trace.steps[trace.receipt.interventions[0].step]
    assert len(found) == 3
    assert {tuple(c.prefix) for c in found} == {tuple(trace.output_ids[: cue.start])}
    assert {tuple(c.kept) for c in found} == {tuple(trace.output_ids[cue.start : cue.end])}
    chosen, rejected = rollouts._sides(
        found[0],
        {
            found[0].id: Result(id="a", output_ids=[5], finish="stop"),
            "guarded-cue": Result(id="b", output_ids=[6], finish="stop"),
        },
    )
    assert chosen == [*found[0].trigger.spaced, 5]
    assert rejected == [*found[0].kept, 6]


def test_traces_of_another_tokenizer_are_refused(bench: pipeline.Workbench, tmp_path: Path) -> None:
    from guard.traces import Receipt, Trace

    receipt = Receipt(guard_id="x", policy="p", policy_hash="h", detector="d", engine="e")
    trace = Trace(
        guard_id="x", created=0.0, model="other", tokenizer_hash="elsewhere", request="r", prompt_ids=[1],
        output_ids=[2], steps=[], receipt=receipt,
    )  # fmt: skip
    Spool(tmp_path).append(trace)
    with pytest.raises(UserError, match=r"None of the 1 traces .* elsewhere"):
        pipeline.collect(bench, tmp_path)
    assert json.loads((bench.out / "collected.json").read_text())["other_tokenizer"] == 1


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    second = pipeline.locked(tmp_path)
    with pipeline.locked(tmp_path), pytest.raises(UserError, match="Another align is running"):
        second.__enter__()
    with pipeline.locked(tmp_path):
        pass


def test_another_runs_directory_is_refused(bench: pipeline.Workbench) -> None:
    other = bench.settings.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="holds another align run"):
        pipeline.Workbench.open(other, bench.out)


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not found"):
        pipeline.load_tokenizer(str(tmp_path / "nothing"))


def test_results_skip_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(Result(id="a", output_ids=[1, 2], finish="stop").model_dump_json() + '\n{"id": "b", "outp')
    assert read_results(path) == {"a": Result(id="a", output_ids=[1, 2], finish="stop")}
    assert read_results(tmp_path / "none.jsonl") == {}


def test_requests_come_from_a_file_or_the_held_out_topics(tmp_path: Path) -> None:
    held_out = built_in(lambda text: [len(text)])
    assert len(held_out) == 240
    assert sum(r.label == "harmful" for r in held_out) == 120
    path = tmp_path / "requests.jsonl"
    path.write_text('{"request": "How do I bake?", "label": "benign"}\n{"request": "x", "label": "odd"}\n')
    with pytest.raises(UserError, match="line 2"):
        from_file(path, lambda _: [1])
