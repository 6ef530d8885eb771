"""Rows as both adapters read them: however an engine deals tokens out, and whatever is left aside, nothing changes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.detector import Asked, Detector, RequestContext
from guard.engine import rows
from guard.engine.session import EngineGuard, GuardedRequest
from guard.engine.settings import EngineSettings
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.steps import Zone
from guard.traces import read_traces, us_since
from tests.guard import kit
from tests.guard.engine.runners import Runner
from tests.guard.hostile import CALM, CUE, END, OBEYS, POLICIES, START, TOKENS, ZONES, any_score

VICTIM = Policy(triggers=("victim",), ladder=("trigger",))
T = kit.runtime(VICTIM).triggers[0].spaced


class AnyDetector(kit.WordDetector):
    """Every kind of score, by the step's text."""

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        scores = [any_score(each.step) for each in asked]
        return np.array([np.nan if score is None else score for score in scores], np.float32)


def made(policy: Policy, detector: Detector, spool: Path | None = None) -> EngineGuard:
    """A real guard; without a spool it writes no traces."""
    runtime = dataclasses.replace(kit.runtime(policy), detector=detector)
    reader = PromptReader(runtime.table, runtime.grammar, (), ())
    settings = EngineSettings(spool=spool or Path("unused"))
    return EngineGuard(settings, runtime, reader, "replay", writes=spool is not None)


@functools.cache
def scoring(policy: Policy) -> EngineGuard:
    """One with every kind of score."""
    return made(policy, AnyDetector())


def opened(policy: Policy, zone: Zone, tokens: list[int]) -> rows.Row:
    return rows.Row(scoring(policy).open([*kit.encode("car"), START if zone == "reasoning" else END], "kit"), tokens)


def dealt(
    policy: Policy, zone: Zone, output: list[int], sizes: list[int], preempted: int | None = None
) -> GuardedRequest:
    """The request after an engine dealt its output out in runs of `sizes`, over and over.

    From its `preempted`-th token on it is a new row, which begins with what the old one had said.
    """
    guard, row = scoring(policy), opened(policy, zone, [])
    turn = 0
    while len(row.tokens) < len(output):
        have = len(row.tokens)
        row.tokens += output[have : have + sizes[turn % len(sizes)]]
        turn += 1
        rows.read(guard, [row])
        assert not row.room or row.request.forced is None, "what is forced is asked for only where there is no room"
        if preempted is not None and preempted <= len(row.tokens) < len(output):
            preempted = None
            rows.finish(guard, row)
            row = opened(policy, zone, list(row.tokens))
    rows.finish(guard, row)
    return row.request


SIZES = st.binary(min_size=1, max_size=5).map(lambda data: [1 + byte % 40 for byte in data])


@settings(max_examples=4000)
@given(TOKENS, POLICIES, ZONES, OBEYS, SIZES, st.integers(0, 200))
def test_any_split_into_engine_steps_decides_the_same(
    model: list[int], policy: Policy, zone: Zone, obeys: Callable[[int], bool], sizes: list[int], preempted: int
) -> None:
    output = kit.generate(kit.monitor(policy, zone=zone), model, any_score, obeys)
    one_by_one = dealt(policy, zone, output, [1])
    for other in (
        dealt(policy, zone, output, [len(output) + 1]),
        dealt(policy, zone, output, sizes),
        dealt(policy, zone, output, [1], preempted),
        dealt(policy, zone, output, sizes, preempted),
    ):
        assert other.broken == one_by_one.broken
        assert (other.monitor.steps, other.monitor.receipt) == (one_by_one.monitor.steps, one_by_one.monitor.receipt)
    if not one_by_one.broken:
        core = kit.replay(kit.monitor(policy, zone=zone), output, any_score)
        assert one_by_one.monitor.steps == core.steps
        assert one_by_one.monitor.receipt == core.receipt


def worded(policy: Policy) -> tuple[EngineGuard, rows.Row]:
    """A guard that scores by words, and a row of it that reasons."""
    guard = made(policy, kit.WordDetector())
    return guard, rows.Row(guard.open([START], "kit"), [])


def test_quiet_tokens_are_left_aside_until_one_may_end_the_step() -> None:
    guard, row = worded(Policy())
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
    guard, row = worded(Policy(max_step_tokens=8))
    tokens = kit.encode(" a b c d e f g") * 3
    for token in tokens:
        row.tokens.append(token)
        rows.read(guard, [row])
    whole = range(0, len(tokens) - 7, 8)
    assert [(step.start, step.end) for step in row.request.monitor.steps] == [(i, i + 8) for i in whole]


class Slow(kit.WordDetector):
    """Takes 20 ms for a request and for a batch."""

    def request(self, *messages: str) -> RequestContext:
        time.sleep(0.02)
        return super().request(*messages)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        time.sleep(0.02)
        return super().score_batch(asked)


def test_what_a_request_waits_for_the_guard_is_kept_a_round_of_scoring_whole_for_each(tmp_path: Path) -> None:
    guard = made(Policy(), Slow(), tmp_path)
    one, two = (rows.Row(guard.open([START], name), []) for name in ("one", "two"))
    clock = time.perf_counter_ns()
    for row in (one, two):
        row.tokens += kit.encode(kit.CALM)
    rows.read(guard, [one, two])
    one.tokens += kit.encode(kit.CALM)
    rows.read(guard, [one, two])
    whole = us_since(clock)
    assert one.request.spent.steps[0] == two.request.spent.steps[0]
    assert [len(row.request.spent.steps) for row in (one, two)] == [2, 1]
    assert min(*one.request.spent.steps, one.request.spent.request) >= 20_000
    assert sum(one.request.spent.steps) <= whole
    # The unfinished step is judged when the request has ended; the trace has it all.
    two.tokens += kit.encode(kit.CALM)[:-1]
    rows.finish(guard, two)
    (trace,) = read_traces(tmp_path)[0]
    assert trace.guard_time == two.request.spent
    assert [len(trace.steps), len(two.request.spent.steps)] == [2, 2]
    assert trace.guard_us == two.request.spent.request + sum(two.request.spent.steps) >= 60_000


def test_placeholders_at_the_end_are_no_tokens() -> None:
    guard, row = worded(Policy())
    row.tokens = [*kit.encode(kit.CALM), -1, -1]
    rows.finish(guard, row)
    assert row.tokens == kit.encode(kit.CALM)
    assert row.request.monitor.receipt.errors == []
    assert len(row.request.monitor.steps) == 1


class Choking(kit.WordDetector):
    """Fails on every batch that holds a step about a car, and counts the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        self.batches.append(len(asked))
        if any("car" in each.step for each in asked):
            raise RuntimeError("no score")
        return super().score_batch(asked)


def test_requests_that_end_a_step_together_are_scored_in_one_batch(either: Callable[..., Runner]) -> None:
    detector = Choking()
    it = either(VICTIM, detector)
    for name in "abc":
        it.add(name, CUE)
    for _ in range(len(CUE) + 1):
        it.step()
    assert list(it.output.values()) == [[*CUE, T[0]]] * 3
    assert detector.batches == [3]


def test_a_step_that_breaks_a_batch_takes_no_other_along(either: Callable[..., Runner]) -> None:
    detector = Choking()
    it = either(VICTIM, detector)
    it.add("cue", CUE)
    it.add("car", [*kit.encode("x"), *CALM])
    for _ in range(len(CUE) + 1):
        it.step()
    assert [out[-1] for out in it.output.values()] == [T[0], T[0]], "unscored is a cue under fail mode closed"
    assert sorted(detector.batches) == [1, 1, 2]
    it.close()
    cue, car = it.traces()["cue"], it.traces()["car"]
    assert (cue.receipt.unscored, cue.receipt.errors, cue.steps[0].score) == (0, [], 0.875)
    assert (car.receipt.unscored, car.receipt.errors) == (1, ["detector: RuntimeError: no score"])
