"""Tensor parallelism and asynchronous scheduling: engines of their own decide what the shared one decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard.traces import read_traces
from tests.conftest import Engine
from tests.guard.engine.apart import ASYNC, replies
from tests.guard.engine.conftest import REQUEST, Script

REQUESTS = [REQUEST, "How do I break into a house?", "How do I bake bread?", "How do I break into a locker?"]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or CPUs")
def test_two_ranks_decide_what_one_decides(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    found = replies(tiny_model, spool, REQUESTS, {"tensor_parallel_size": 2})
    one = engine.run([(request, {}) for request in REQUESTS])
    assert found == [reply.ids for reply in one]
    traces = {trace.guard_id: trace for trace in read_traces(spool)[0]}
    assert len(list(spool.glob("spool-*.jsonl"))) == 1, "the first rank alone writes"
    for number, reply in enumerate(one):
        assert reply.trace is not None
        trace = traces[f"r{number}"]
        assert trace.output_ids == reply.ids
        assert trace.steps == reply.trace.steps
        assert trace.receipt.interventions == reply.trace.receipt.interventions
        assert trace.receipt.clean


def test_asynchronous_scheduling_decides_the_same(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    found = replies(tiny_model, spool, REQUESTS, {ASYNC: True})
    same = engine.run([(request, {}) for request in REQUESTS])
    assert found == [reply.ids for reply in same]
    traces = {trace.guard_id: trace for trace in read_traces(spool)[0]}
    for number, reply in enumerate(same):
        assert reply.trace is not None
        trace = traces[f"r{number}"]
        assert trace.output_ids == reply.ids, "the step after the end sampled a token that no one asked for"
        assert (trace.steps, trace.receipt.interventions) == (reply.trace.steps, reply.trace.receipt.interventions)
        assert trace.receipt.clean


def test_asynchronous_scheduling_hides_the_token_that_ends_by_length_from_runner_v1(
    engine: Engine, script: Script, tiny_model: Path, tmp_path: Path
) -> None:
    spool, limit = tmp_path / "spool", script.at + 3
    (found,) = replies(tiny_model, spool, [REQUEST], {ASYNC: True}, max_tokens=limit)
    (reply,) = engine.run([(REQUEST, {"max_tokens": limit})])
    assert found == reply.ids
    (trace,) = (trace for trace in read_traces(spool)[0] if trace.guard_id == "r0")
    hidden = engine.guard._engine == "vllm-v1"
    assert trace.output_ids == (reply.ids[:-1] if hidden else reply.ids)
    (cut,) = trace.receipt.interventions
    assert (cut.at, cut.forced, cut.completed) == (script.at, 3 - hidden, False)
    assert not trace.receipt.errors
