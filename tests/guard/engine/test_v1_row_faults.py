"""The V1 adapter when something goes wrong in a row: placeholders, masks, detectors, the spool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from classifiers.detector import Asked, RequestContext
from guard.policy import Policy
from tests.guard import kit
from tests.guard.engine.conftest import EOS, Batch

Make = Callable[..., Batch]
ONE = Policy(triggers=("victim",))
(VICTIM,) = kit.runtime(ONE).triggers
T = VICTIM.spaced
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)


@pytest.mark.parametrize("fail_mode", ["closed", "open"])
def test_a_placeholder_breaks_the_guard_and_closed_ends_the_request(batch: Make, fail_mode: str) -> None:
    it = batch(Policy.model_validate({"fail_mode": fail_mode}))
    row, other = [*CALM, -1], list(CALM)
    it.update(added={0: ({"guard_id": "x"}, row), 1: ({"guard_id": "y"}, other)})
    expected = {0: EOS} if fail_mode == "closed" else {}
    assert it.forced() == expected
    row.extend(CUE)
    assert it.forced() == expected
    # A mask does not save a request that must end: it may fail instead.
    assert it.forced(masked={0: [EOS]}) == expected
    it.update(removed=(0, 1))
    assert it.traces()["x"].receipt.errors == ["the engine showed a placeholder instead of a token (async scheduling)"]
    assert it.traces()["x"].receipt.seen == 1
    assert it.traces()["y"].receipt.errors == []


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


@pytest.mark.parametrize(("fail_mode", "then"), [("closed", {0: EOS}), ("open", {})])
def test_a_row_that_was_not_obeyed_is_recorded(batch: Make, fail_mode: str, then: dict[int, int]) -> None:
    it, row = batch(ONE.model_copy(update={"fail_mode": fail_mode})), list(CUE)
    it.update(added={0: ({"guard_id": "x"}, row)})
    assert it.forced() == {0: T[0]}
    row.extend(CALM)
    assert it.forced() == then
    it.update(removed=(0,))
    assert it.traces()["x"].receipt.enforcement_failed == 1


class Faulty(kit.WordDetector):
    """Fails in one of three ways on every step, or on the request."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._fault = fault

    def request(self, request: str) -> RequestContext:
        if self._fault == "request":
            raise RuntimeError("no context")
        return super().request(request)

    def score_batch(self, asked: Sequence[Asked], **_: Any) -> npt.NDArray[np.float32]:
        if self._fault == "raises":
            raise RuntimeError("no score")
        if self._fault == "request":
            return super().score_batch(asked)  # must not be asked without a context
        return np.array([], np.float32) if self._fault == "empty" else np.full(len(asked), np.nan, np.float32)


FAULTS = {
    "raises": "detector: RuntimeError: no score", "empty": "detector: ValueError: 0 scores for 1 steps",
    "request": "request: RuntimeError: no context",
    "nan": "",
}  # fmt: skip


@pytest.mark.parametrize("fail_mode", ["closed", "open"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_detector_leaves_steps_unscored(batch: Make, fault: str, fail_mode: str) -> None:
    it = batch(Policy.model_validate({"triggers": ["victim"], "fail_mode": fail_mode}), Faulty(fault))
    row = list(CALM)
    it.update(added={0: ({"guard_id": "x"}, row)})
    assert it.forced() == ({0: T[0]} if fail_mode == "closed" else {})
    it.update(removed=(0,))
    receipt = it.traces()["x"].receipt
    assert (receipt.seen, receipt.scored, receipt.unscored) == (1, 0, 1)
    assert [e for e in receipt.errors if e.startswith(FAULTS[fault])] == receipt.errors
    assert len(receipt.errors) == (0 if fault == "nan" else 1)
    assert not receipt.clean


def test_a_spool_that_fails_is_logged_and_not_raised(batch: Make, caplog: pytest.LogCaptureFixture) -> None:
    it = batch(ONE)
    it.update(added={0: ({"guard_id": "x"}, list(CUE)), 1: ({"guard_id": "y"}, list(CUE))})
    it.forced()
    it.spool.rmdir()
    with caplog.at_level(logging.ERROR, "guard"):
        it.update(removed=(0,))
        it.processor._guard._spool = object()  # a bug of our own, no OSError
        it.update(removed=(1,))
    assert "trace x was not written: [Errno 2]" in caplog.text
    assert "trace y was not written: 'object' object has no attribute" in caplog.text


def test_a_probe_is_no_proof_when_the_detector_fails(batch: Make) -> None:
    it = batch(Policy(fail_mode="open"), Faulty("nan"), secret="s3cret")
    it.update(added={0: ({"guard_id": "p", "guard_probe": "s3cret"}, [CALM[0]])})
    assert it.forced() == {}
    it.update(removed=(0,))
    assert it.traces()["p"].receipt.unscored == 1


class Choking(kit.WordDetector):
    """Fails on every batch that holds a step about a car, and counts the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def score_batch(self, asked: Sequence[Asked], **_: Any) -> npt.NDArray[np.float32]:
        self.batches.append(len(asked))
        if any("car" in each.step for each in asked):
            raise RuntimeError("no score")
        return super().score_batch(asked)


def test_rows_that_end_a_step_together_are_scored_in_one_batch(batch: Make) -> None:
    detector = Choking()
    it = batch(ONE, detector)
    it.update(added={i: ({"guard_id": str(i)}, list(CUE)) for i in range(3)})
    assert it.forced() == dict.fromkeys(range(3), T[0])
    assert detector.batches == [3]


def test_a_step_that_breaks_a_batch_takes_no_other_along(batch: Make) -> None:
    detector = Choking()
    it = batch(ONE, detector)
    it.update(added={0: ({"guard_id": "cue"}, list(CUE)), 1: ({"guard_id": "car"}, list(CALM))})
    assert it.forced() == {0: T[0], 1: T[0]}, "unscored is a cue under fail mode closed"
    assert detector.batches == [2, 1, 1]
    it.update(removed=(0, 1))
    cue, car = it.traces()["cue"], it.traces()["car"]
    assert (cue.receipt.unscored, cue.receipt.errors, cue.steps[0].score) == (0, [], 0.875)
    assert (car.receipt.unscored, car.receipt.errors) == (1, ["detector: RuntimeError: no score"])
