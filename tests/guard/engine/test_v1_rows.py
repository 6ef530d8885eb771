"""The V1 adapter over real `BatchUpdate` objects: rows that come, go, move and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import MoveDirectionality

from guard.engine.v1 import GuardV1
from guard.policy import Policy
from guard.traces import Receipt, Trace
from tests.guard import kit
from tests.guard.engine.conftest import EOS, PROMPT, Batch

Make = Callable[..., Batch]
ONE = Policy(triggers=("victim",))
(VICTIM,) = kit.runtime(ONE).triggers
T = VICTIM.spaced
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)


def settled(trace: Trace) -> dict[str, Any]:
    """What a trace says, without the time it was written."""
    return trace.model_dump(exclude={"created"})


def replayed(output: list[int], policy: Policy | None = None) -> Receipt:
    """The receipt that the core gives for these output ids."""
    receipt = kit.replay(kit.monitor(policy, request="car"), output).receipt
    return receipt.model_copy(update={"engine": "vllm-v1"})


def test_only_the_row_with_a_cue_is_forced_and_at_once(batch: Make) -> None:
    it, one, two = batch(ONE), list(CALM), list(CUE[:-1])
    it.update(added={0: ({"guard_id": "one"}, one), 2: ({"guard_id": "two"}, two)})
    assert it.forced() == {}
    one.append(CUE[0])
    two.append(CUE[-1])
    assert it.forced() == {2: T[0]}
    two.append(T[0])
    it.processor.update_state(None)
    assert it.forced() == {2: T[1]}
    two.extend(T[1:])
    assert it.forced() == {}


def test_applying_again_without_a_new_token_forces_the_same(batch: Make) -> None:
    # A row that waits for the rest of its prompt is sampled, and the sample thrown away.
    it, row = batch(ONE), [*CUE, T[0]]
    it.update(added={0: ({}, row)})
    assert [it.forced(1) for _ in range(3)] == [{0: T[1]}] * 3


def test_a_removed_row_leaves_its_trace(batch: Make) -> None:
    it, row = batch(ONE), [*CUE, *T]
    it.update(added={1: ({"guard_id": "x"}, row)})
    it.forced()
    row.extend([*CALM, EOS])  # sampled in the last step, never seen by `apply`
    it.update(removed=(1,))
    trace = it.traces()["x"]
    assert (trace.output_ids, trace.prompt_ids, trace.request) == ([*CUE, *T, *CALM, EOS], PROMPT, "car")
    assert (trace.model, trace.tokenizer_hash) == ("kit", kit.runtime().tokenizer_hash)
    assert [(s.start, s.end, s.injected) for s in trace.steps] == [
        (0, 8, False), (8, 8 + len(T), True), (8 + len(T), 15 + len(T), False),
    ]  # fmt: skip
    assert trace.receipt == replayed(trace.output_ids, ONE).model_copy(update={"guard_id": "x"})
    assert it.forced() == {}


def test_swapped_rows_take_their_plans_along(batch: Make) -> None:
    it, one, two = batch(ONE), list(CUE), [*CUE, *T[:2]]
    it.update(added={0: ({"guard_id": "one"}, one), 3: ({"guard_id": "two"}, two)})
    assert it.forced() == {0: T[0], 3: T[2]}
    it.update(moved=((0, 3, MoveDirectionality.SWAP),))
    assert it.forced() == {3: T[0], 0: T[2]}
    two.append(T[2])
    assert it.forced() == {3: T[0], 0: T[3]}
    it.update(moved=((2, 0, MoveDirectionality.SWAP),))  # with a row that is not guarded
    assert it.forced() == {3: T[0], 2: T[3]}
    assert it.traces() == {}


def test_a_moved_row_fills_the_hole_that_a_removed_one_left(batch: Make) -> None:
    it, one, two = batch(ONE), list(CUE), [*CUE, T[0]]
    it.update(added={0: ({"guard_id": "one"}, one), 3: ({"guard_id": "two"}, two)})
    it.update(removed=(0,), moved=((3, 0, MoveDirectionality.UNIDIRECTIONAL),))
    assert it.forced() == {0: T[1]}
    assert list(it.traces()) == ["one"]


def test_a_row_that_is_moved_onto_or_added_over_ends(batch: Make) -> None:
    it = batch(ONE)
    it.update(added={i: ({"guard_id": str(i)}, list(CUE)) for i in range(3)})
    it.update(moved=((1, 0, MoveDirectionality.UNIDIRECTIONAL),))
    assert list(it.traces()) == ["0"]
    it.update(added={2: ({"guard_id": "new"}, [])})
    assert list(it.traces()) == ["0", "2"]
    assert it.forced() == {0: T[0]}
    # An unguarded row that moves onto a guarded row's place ends it as well.
    it.update(moved=((3, 0, MoveDirectionality.UNIDIRECTIONAL),))
    assert list(it.traces()) == ["0", "2", "1"]
    assert it.forced() == {}


@pytest.mark.parametrize("seen", [0, 1, 7, 8, 9, 11, 8 + len(T), 12 + len(T)])
def test_a_resumed_row_replays_to_the_same_plan(batch: Make, seen: int) -> None:
    whole = kit.generate(kit.monitor(ONE), [*CUE, *CALM])
    it = batch(ONE)
    row: list[int] = []
    it.update(added={1: ({"guard_id": "x"}, row)})
    for token in whole[:seen]:
        assert it.forced().get(1, token) == token
        row.append(token)
    before = it.forced()
    it.update(removed=(1,))
    resumed = list(row)
    it.update(added={3: ({"guard_id": "x"}, resumed)})
    assert list(it.forced().values()) == list(before.values())
    resumed.extend(whole[seen:])
    it.update(removed=(3,))
    trace = it.traces()["x"]
    assert trace.output_ids == whole
    assert trace.receipt == replayed(whole, ONE).model_copy(update={"guard_id": "x"})


FLOW = st.lists(st.sampled_from([*CALM, *CUE, 3, 4, EOS, *kit.encode("\n!")]), max_size=60)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(FLOW, min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_any_split_into_engine_steps_decides_the_same(
    batch: Make, flows: list[list[int]], sizes: list[int], cues: int
) -> None:
    it = batch(Policy(zones=("reasoning", "answer")))
    whole = [kit.generate(kit.monitor(Policy(zones=("reasoning", "answer"))), [*CUE * cues, *flow]) for flow in flows]
    rows: list[list[int]] = [[] for _ in whole]
    it.update(added={i: ({"guard_id": str(i)}, row) for i, row in enumerate(rows)})
    for turn in range(200):
        for i, row in enumerate(rows):
            row.extend(whole[i][len(row) : len(row) + sizes[(turn + i) % len(sizes)]])
        it.forced()
        if all(len(row) == len(ids) for row, ids in zip(rows, whole, strict=True)):
            break
    it.update(removed=tuple(range(len(rows))))
    for i, ids in enumerate(whole):
        core = kit.replay(kit.monitor(Policy(zones=("reasoning", "answer")), request="car"), ids)
        trace = it.traces()[str(i)]
        assert (trace.output_ids, trace.steps) == (ids, core.steps)
        assert trace.receipt == core.receipt.model_copy(update={"guard_id": str(i), "engine": "vllm-v1"})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-2, len(kit.runtime().table.bytes_of) + 5), max_size=120))
def test_any_ids_never_raise(batch: Make, ids: list[int]) -> None:
    it = batch()
    row: list[int] = []
    it.update(added={0: ({"guard_id": "x"}, row)})
    for token in ids:
        row.append(token)
        it.forced(1)
    it.update(removed=(0,))
    assert it.traces()["x"].output_ids == ids


def test_off_counts_only_where_the_engine_allows_it(batch: Make) -> None:
    allowed, forbidden = batch(ONE, allow_off=True), batch(ONE)
    for it in (allowed, forbidden):
        it.update(added={0: ({"guard_off": True, "guard_id": "x"}, list(CUE))})
    assert allowed.forced() == {}
    assert forbidden.forced() == {0: T[0]}
    allowed.update(removed=(0,))
    assert allowed.traces() == {}


def test_a_probe_needs_the_secret(batch: Make) -> None:
    it = batch(ONE, secret="s3cret")
    row = {"right": [CALM[0]], "wrong": [CALM[0]], "none": [CALM[0]]}
    it.update(added={
        0: ({"guard_id": "right", "guard_probe": "s3cret"}, row["right"]),
        1: ({"guard_id": "wrong", "guard_probe": "s3cret "}, row["wrong"]), 2: ({"guard_id": "none"}, row["none"]),
    })  # fmt: skip
    assert it.forced() == {0: T[0]}
    without = batch(ONE)
    without.update(added={0: ({"guard_probe": ""}, [CALM[0]])})
    assert without.forced() == {}


def test_rows_without_an_id_get_distinct_ones(batch: Make) -> None:
    it = batch(ONE)
    it.update(added={0: ({}, list(CALM)), 1: ({}, list(CALM))})
    it.update(removed=(0, 1))
    assert len(it.traces()) == 2
    assert all(guard_id.startswith("anon-") for guard_id in it.traces())


@pytest.mark.parametrize("extra", [{"guard_id": 5}, {"guard_off": "yes"}, {"guard_off": 1}, {"guard_probe": ["a"]}])
def test_guard_arguments_of_the_wrong_shape_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="guard arguments: Input should be a valid"):
        GuardV1.validate_params(SamplingParams(extra_args=extra))


def test_other_arguments_are_none_of_ours() -> None:
    others = SamplingParams(extra_args={"kv": {"a": 1}, "guard_id": "x"})
    assert GuardV1.validate_params(SamplingParams()) is None
    assert GuardV1.validate_params(others) is None
    assert others.extra_args == {"kv": {"a": 1}, "guard_id": "x"}


def test_forcing_changes_the_most_likely_token(batch: Make) -> None:
    assert batch(ONE).processor.is_argmax_invariant() is False


def test_a_masked_id_is_not_forced_and_the_receipt_says_so(batch: Make) -> None:
    it, row = batch(ONE), [*CUE, T[0]]
    it.update(added={0: ({"guard_id": "x"}, row)})
    assert it.forced(masked={0: [T[1]]}) == {}
    assert it.forced() == {}  # given up, not put off
    row.extend(CALM)
    it.update(removed=(0,))
    receipt = it.traces()["x"].receipt
    assert (receipt.enforcement_failed, receipt.injected_tokens) == (1, 1)
    assert receipt.errors == ["a grammar or mask forbids the next trigger token"]
    assert [(i.forced, i.completed) for i in receipt.interventions] == [(1, False)]


@pytest.mark.parametrize("lost", [slice(None), T[1], T[2]])
def test_broken_weights_are_not_hidden_by_a_forced_token(batch: Make, lost: slice | int) -> None:
    it, row = batch(ONE), [*CUE, T[0]]
    it.update(added={0: ({"guard_id": "x"}, row)})
    logits = torch.zeros(1, len(kit.runtime().table.bytes_of))
    logits[0, lost] = float("nan")
    assert torch.equal(it.processor.apply(logits.clone()).isnan(), logits.isnan())
    it.update(removed=(0,))
    receipt = it.traces()["x"].receipt
    assert (receipt.enforcement_failed, receipt.clean) == (1, False)
    assert receipt.errors == ["the model's logits are no numbers"]


def test_a_mask_does_not_save_a_request_that_must_end(batch: Make) -> None:
    it = batch(ONE)
    it.update(added={0: ({"guard_id": "x"}, [*CALM, -1])})
    assert it.forced(masked={0: [EOS]}) == {0: EOS}
