"""Rows as both adapters read them: what is left aside changes nothing."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from guard.engine import rows
from guard.engine.session import EngineGuard, EngineSettings, GuardedRequest
from guard.policy import Policy
from guard.steps import Zone
from tests.guard import kit
from tests.guard.test_monitor_properties import POLICIES

SIZE = len(kit.runtime().table.bytes_of)
TEXT = kit.encode(kit.CALM) + kit.encode(" " + kit.CUE) + kit.encode(" a b c d e f g")
TOKENS = st.lists(st.one_of(st.sampled_from(TEXT), st.integers(0, SIZE + 3)), max_size=150)


def row_of(policy: Policy, zone: Zone) -> tuple[EngineGuard, rows.Row]:
    """A guard that scores by words and writes nothing, and a row of it."""
    runtime = kit.runtime(policy)
    guard = EngineGuard(EngineSettings(spool=Path("unused")), runtime, None, "replay", writes=False)  # type: ignore[arg-type]
    watcher = kit.monitor(policy, zone=zone)
    request = GuardedRequest(watcher, runtime.detector.request("car"), [], end_id=2, probe=False)
    return guard, rows.Row(request, [])


@settings(max_examples=400, deadline=None)
@given(TOKENS, POLICIES, st.sampled_from(["reasoning", "answer"]), st.lists(st.integers(1, 9), min_size=1))
def test_any_split_into_engine_steps_decides_the_same(
    model: list[int], policy: Policy, zone: Zone, sizes: list[int]
) -> None:
    known = kit.monitor(policy, zone=zone)
    output = kit.generate(known, model)
    guard, row = row_of(policy, zone)
    start = turn = 0
    while start < len(output):
        size = sizes[turn % len(sizes)]
        row.tokens += output[start : start + size]
        rows.read(guard, [row])
        if row.room:
            assert row.request.forced is None, "what is forced is asked for only where there is no room"
        start, turn = start + size, turn + 1
    rows.finish(guard, row)
    assert (row.request.monitor.steps, row.request.monitor.receipt) == (known.steps, known.receipt)
    assert row.tokens == output


def test_quiet_tokens_are_left_aside_until_one_may_end_the_step() -> None:
    guard, row = row_of(Policy(), "reasoning")
    *quiet, last = kit.encode(kit.CALM)
    for token in quiet:
        row.tokens.append(token)
        rows.read(guard, [row])
    # The first one makes room for the others.
    assert (row.read, row.seen) == (1, len(quiet))
    row.tokens.append(last)
    rows.read(guard, [row])
    assert (row.read, row.seen) == (len(quiet) + 1, len(quiet) + 1)
    (step,) = row.request.monitor.steps
    assert (step.start, step.end) == (0, len(quiet) + 1)


def test_a_full_step_is_cut_where_it_would_be_token_by_token() -> None:
    guard, row = row_of(Policy(max_step_tokens=8), "reasoning")
    tokens = kit.encode(" a b c d e f g") * 3
    for token in tokens:
        row.tokens.append(token)
        rows.read(guard, [row])
    whole = range(0, len(tokens) - 7, 8)
    assert [(step.start, step.end) for step in row.request.monitor.steps] == [(i, i + 8) for i in whole]


def test_placeholders_at_the_end_are_no_tokens() -> None:
    guard, row = row_of(Policy(), "reasoning")
    row.tokens = [*kit.encode(kit.CALM), -1, -1]
    rows.finish(guard, row)
    assert row.tokens == kit.encode(kit.CALM)
    assert row.request.monitor.receipt.errors == []
    assert len(row.request.monitor.steps) == 1
