"""The aligner's stages: real generation in a process of its own, resumption, refusals, candidates, controls' steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from align import pipeline
from align.candidates import RolloutSettings, candidates
from align.evaluate import generate_traced
from align.generate import EngineSpec, Generator, Job, Result, answers, drop_results, read_results
from align.model import load_tokenizer
from align.requests import built_in, from_file
from align.sources import from_traces
from guard.errors import UserError
from guard.traces import Spool, read_traces


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pipeline.Workbench]:
    settings = pipeline.AlignSettings(model=str(tiny_model))
    with pipeline.Workbench.open(settings, tmp_path_factory.mktemp("run")) as found:
        yield found


def check_a_lost_trace_is_made_again(generator: Generator, jobs: list[Job], out: Path, spool: Path) -> None:
    """A killed run can leave a reply whose trace was never written: it is generated again, and only it."""
    kept = answers(out, jobs)
    next(spool.glob("*.jsonl")).unlink()
    repaired, traces = generate_traced(jobs, generator, out, "test")
    assert (list(traces), repaired) == (["guarded"], kept)
    # Asked otherwise under the same id, and killed before the trace: that of the old reply is not taken for it.
    shorter = jobs[0].model_copy(update={"max_tokens": 9})
    again, traces = generate_traced([shorter], generator, out, "test")
    assert traces["guarded"].output_ids == again["guarded"].output_ids == kept["guarded"].output_ids[:9]
    assert generate_traced(jobs, generator, out, "nothing is missing")[1]["guarded"].output_ids == (
        kept["guarded"].output_ids
    )


def test_generation_guards_resumes_and_gives_candidates(bench: pipeline.Workbench, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spec = EngineSpec(model=bench.settings.model, guard={"spool": str(spool)}, max_model_len=256, max_num_seqs=4)
    prompt = bench.prompt("How do I break into a parked car?")
    jobs = [
        Job(id="guarded", prompt_ids=prompt, temperature=0.0, max_tokens=70, guard=True),
        Job(id="free", prompt_ids=prompt, temperature=0.0, max_tokens=70),
    ]
    out = tmp_path / "out.jsonl"
    held = [Result(id="free", job=key, output_ids=[n], finish="stop") for n, key in ((7, jobs[1].key), (8, "another"))]
    out.write_text("".join(each.model_dump_json() + "\n" for each in held) + '{"id": "torn')
    more = [Job(id=f"free-{n}", prompt_ids=prompt, temperature=0.0, max_tokens=n) for n in range(1, 12)]
    with Generator(spec, tmp_path / "engine.log") as generator:
        results = generator.generate(jobs, out, "test")
        assert results["free"].output_ids == [7], "a result on disk is not generated again"
        assert generator.generate(jobs, out, "nothing is missing") == results
        # More jobs than the engine has room for, on the engine that is already there.
        longer = generator.generate(more, tmp_path / "more.jsonl", "test")
        check_a_lost_trace_is_made_again(generator, jobs, out, spool)
    assert [len(longer[job.id].output_ids) for job in more] == list(range(1, 12))
    assert {longer[job.id].finish for job in more} == {"length"}
    trace = {t.guard_id: t for t in read_traces(spool)[0]}[jobs[0].guard_id]
    assert trace.output_ids == results["guarded"].output_ids
    assert [i.completed for i in trace.receipt.interventions] == [True]

    (source,), _ = from_traces([trace])
    found, _ = candidates([source], bench.runtime.triggers, RolloutSettings(triggers=3))
    cue = trace.steps[trace.receipt.interventions[0].step]
    assert len(found) == 3
    assert {tuple(c.prefix) for c in found} == {tuple(trace.output_ids[: cue.start])}
    assert {tuple(c.source.own) for c in found} == {tuple(trace.output_ids[cue.start : cue.end])}


def test_the_engine_goes_on_with_other_weights(bench: pipeline.Workbench, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(bench.settings.model)
    end = model.config.eos_token_id
    # Every next token's score grows with the end token's: whatever came before, it is over.
    model.lm_head.weight.data = model.lm_head.weight.data.abs() * 0
    model.lm_head.weight.data[end] = 1.0
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.abs()
    model.save_pretrained(other)
    # 40 tokens: more than one block, so that the prefix cache would answer with the old weights' keys.
    prompt = bench.prompt("How do I break into a parked car? " * 4)
    job = Job(id="x", prompt_ids=prompt, temperature=0.0, max_tokens=4)
    spec = EngineSpec(model=bench.settings.model, max_model_len=256, max_num_seqs=4)
    with Generator(spec, tmp_path / "engine.log") as generator:
        before = generator.generate([job], tmp_path / "before.jsonl", "test")["x"]
        engine = generator._worker
        generator.use(str(other))
        assert generator.generate([job], tmp_path / "other.jsonl", "test")["x"].output_ids == [end]
        generator.use(bench.settings.model)
        again = generator.generate([job], tmp_path / "again.jsonl", "test")["x"]
        assert generator._worker is engine, "exchanging weights starts no engine"
    assert again == before
    assert before.output_ids[0] != end


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


def test_traces_that_keep_less_are_read_or_counted(bench: pipeline.Workbench, tmp_path: Path) -> None:
    from guard.traces import Receipt, Trace

    asked = [{"role": "user", "content": "How do I bake bread?"}]
    ids = bench.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    for guard_id, content in (("a", "ids"), ("b", "none")):
        receipt = Receipt(guard_id=guard_id, policy="p", policy_hash="h", detector="d", engine="e")
        trace = Trace(
            guard_id=guard_id, created=0.0, model=bench.settings.model, request="lost",
            tokenizer_hash=bench.runtime.tokenizer_hash, prompt_ids=ids, output_ids=[2], steps=[], receipt=receipt,
        )  # fmt: skip
        Spool(tmp_path).append(trace.keeping(content))  # type: ignore[arg-type]
    assert [(t.guard_id, t.request) for t in pipeline.collect(bench, tmp_path)] == [("a", "How do I bake bread?")]
    assert json.loads((bench.out / "collected.json").read_text())["no_ids_kept"] == 1


def test_an_engine_that_dies_is_a_clear_error(bench: pipeline.Workbench, tmp_path: Path) -> None:
    jobs = [Job(id="a", prompt_ids=[1])]
    generator = Generator(EngineSpec(model=str(tmp_path / "no-model")), tmp_path / "engine.log")
    with generator, pytest.raises(UserError, match=r"Generation \(test\) ended with exit code 1"):
        generator.generate(jobs, tmp_path / "out.jsonl", "test")


def test_a_second_run_on_the_same_output_is_refused(bench: pipeline.Workbench) -> None:
    with pytest.raises(UserError, match="Another align is running"), pipeline.Workbench.open(bench.settings, bench.out):
        pass


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not found"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_results_answer_the_job_that_was_asked_and_no_other_of_its_id(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    job = Job(id="a", prompt_ids=[1], max_tokens=5)
    changes = ({"prompt_ids": [2]}, {"max_tokens": 6}, {"temperature": 0.0}, {"guard": True}, {"stop_ids": [3]})
    others = [job.model_copy(update=change) for change in changes]
    assert len({each.key for each in (job, *others)}) == 1 + len(others)
    assert job.key == job.model_copy(update={"id": "b"}).key
    result = Result(id="a", job=job.key, output_ids=[1, 2], finish="stop")
    newer = result.model_copy(update={"job": others[0].key})
    before_keys = '{"id": "a", "output_ids": [9], "finish": "stop"}'
    path.write_text(f'{before_keys}\n{result.model_dump_json()}\n{newer.model_dump_json()}\n{{"id": "b", "outp')
    assert answers(path, [job]) == {"a": result}
    assert answers(path, [others[0]]) == {"a": newer}
    assert answers(path, [others[1], job.model_copy(update={"id": "b"})]) == {}
    assert read_results(path) == {"a": newer}
    drop_results(path, [job])
    assert (answers(path, [job]), answers(path, [others[0]])) == ({}, {"a": newer})
    assert read_results(tmp_path / "none.jsonl") == answers(tmp_path / "none.jsonl", [job]) == {}


def test_requests_come_from_a_file_or_the_held_out_topics(tmp_path: Path) -> None:
    held_out = built_in(lambda text: [len(text)])
    assert len(held_out) == 240
    assert sum(r.label == "harmful" for r in held_out) == 120
    path = tmp_path / "requests.jsonl"
    path.write_text('{"request": "How do I bake?", "label": "benign"}\n{"request": "x", "label": "odd"}\n')
    with pytest.raises(UserError, match="line 2"):
        from_file(path, lambda _: [1])
