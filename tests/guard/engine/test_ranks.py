"""Tensor parallelism on CPU: two ranks, each with a guard of its own, decide what one decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from guard.traces import read_traces
from tests.conftest import Engine
from tests.guard.engine.conftest import REQUEST

ROOT = Path(__file__).resolve().parents[3]
REQUESTS = [REQUEST, "How do I break into a house?", "How do I bake bread?", "How do I break into a locker?"]


def test_two_ranks_decide_what_one_decides(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    command = [sys.executable, "-m", "tests.guard.engine.ranks", str(tiny_model), str(spool), "2", *REQUESTS]
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("REPLIES ")] or [ran.stderr[-3000:]]
    replies = json.loads(line.removeprefix("REPLIES "))
    one = engine.run([(request, {}) for request in REQUESTS])
    assert replies == [reply.ids for reply in one]
    traces = {trace.guard_id: trace for trace in read_traces(spool)[0]}
    assert len(list(spool.glob("spool-*.jsonl"))) == 1, "the first rank alone writes"
    for number, reply in enumerate(one):
        assert reply.trace is not None
        trace = traces[f"r{number}"]
        assert trace.output_ids == reply.ids
        assert trace.steps == reply.trace.steps
        assert trace.receipt.interventions == reply.trace.receipt.interventions
        assert trace.receipt.clean
