"""What counts as a proof of life, on traces with the tiny tokenizer's real trigger ids."""

from __future__ import annotations

from typing import Any

import pytest

from guard.runtime import GuardRuntime
from guard.sidecar.probe import probe_problem
from guard.sidecar.proof import Delivered
from guard.traces import Intervention, Trace
from tests.guard.sidecar.scripted import trace_of


def probe_trace(runtime: GuardRuntime, **changes: Any) -> Trace:
    """A trace in which the first trigger of the pool follows the first token."""
    trigger = runtime.triggers[0]
    forced = len(trigger.spaced)
    done = Intervention(step=0, at=1, trigger_id=trigger.id, score=1.0, forced=forced, completed=True)
    trace = trace_of("probe-1", runtime.policy, **{"interventions": [done], "injected_tokens": forced, **changes})
    return trace.model_copy(update={"output_ids": [9, *trigger.spaced, 9]})


def test_a_whole_trigger_in_the_output_is_the_proof(runtime: GuardRuntime) -> None:
    trace = probe_trace(runtime)
    assert probe_problem(trace, Delivered(len(trace.output_ids)), runtime) is None


def test_ids_that_are_not_the_triggers_are_no_proof(runtime: GuardRuntime) -> None:
    trace = probe_trace(runtime)
    trace.output_ids[2] += 1
    wanted = "the probe's trigger is not in its output"
    assert probe_problem(trace, Delivered(len(trace.output_ids)), runtime) == wanted


@pytest.mark.parametrize(("changes", "reason"), [
    ({"interventions": []}, "the probe saw 0 interventions instead of one"),
    ({"errors": ["detector: X"]}, "the guard failed on the probe: detector: X"),
    ({"unscored": 1}, "the probe was not scored or enforced in full"),
    ({"enforcement_failed": 1}, "the probe was not scored or enforced in full"),
])  # fmt: skip
def test_every_gap_has_its_reason(runtime: GuardRuntime, changes: dict[str, Any], reason: str) -> None:
    trace = probe_trace(runtime, **changes)
    assert probe_problem(trace, Delivered(len(trace.output_ids)), runtime) == reason


def test_an_unfinished_trigger_and_a_short_trace_are_no_proof(runtime: GuardRuntime) -> None:
    trace = probe_trace(runtime)
    length = len(trace.output_ids)
    trace.receipt.interventions[0].completed = False
    unfinished = "the probe's trigger was not forced to its end"
    assert probe_problem(trace, Delivered(length), runtime) == unfinished
    short = f"the probe's trace holds {length} tokens, its response 64"
    assert probe_problem(trace, Delivered(64), runtime) == short
    assert probe_problem(None, Delivered(64), runtime) == (
        "the probe left no trace: the guard is not loaded in the engine"
    )
