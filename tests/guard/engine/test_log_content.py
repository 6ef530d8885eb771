"""What a policy lets the live engine write, and that the proofs hold all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.policy import Policy
from guard.sidecar.probe import probe_problem
from guard.sidecar.proof import Delivered, prove
from guard.traces import LogContent, read_traces
from tests.conftest import Engine
from tests.guard.engine.conftest import REQUEST, Script, Swap
from tests.guard.engine.test_live_engine import check_corrected


@pytest.mark.parametrize("content", ["full", "ids", "none"])
def test_the_spool_holds_what_the_policy_lets_it(
    engine: Engine, script: Script, swap: Swap, tmp_path: Path, content: LogContent
) -> None:
    policy = Policy(log_content=content)
    with swap(policy=policy, spool=tmp_path) as guard:
        (whole,) = engine.run([(REQUEST, {})])
        engine.flush()
        (probed,) = engine.run([("Say hello.", {"extra_args": {"guard_probe": "s3cret"}})])
        engine.flush()
        traces = {trace.receipt.policy: trace for trace in read_traces(tmp_path)[0]}
        runtime = guard._runtime
    trace, probe = traces["default"], traces["probe"]
    (path,) = tmp_path.iterdir()
    assert (REQUEST in path.read_text()) is (content == "full")
    assert trace.request == (REQUEST if content == "full" else "")
    assert trace.output_ids == (whole.ids if content != "none" else [])
    assert trace.prompt_ids == (engine.prompt(REQUEST) if content != "none" else [])
    assert (trace.prompt_tokens, trace.output_tokens) == (len(engine.prompt(REQUEST)), len(whole.ids))
    assert len(trace.receipt.interventions) == 1
    assert trace.guard_time is not None
    assert len(trace.guard_time.steps) == trace.receipt.seen
    assert min(trace.guard_time.request, *trace.guard_time.steps) > 0
    proof = prove(trace.guard_id, trace, Delivered(len(whole.ids)), policy)
    assert (proof.broken, proof.attached.guarded, proof.attached.interventions) == (False, True, 1)
    assert prove(trace.guard_id, trace, Delivered(len(whole.ids) + 1), policy).broken
    # The proof of life reads the trigger's ids; its text is ours.
    assert probe.output_ids == probed.ids
    assert probe_problem(probe, Delivered(len(probed.ids)), runtime) is None
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])
