"""Errors inside the guard, on both model runners under both fail modes: recorded, answered, and never the engine's."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from classifiers.detector import Asked, RequestContext
from guard.monitor import StepMonitor
from guard.policy import Policy
from tests.guard import kit
from tests.guard.engine.conftest import EOS
from tests.guard.engine.runners import Runner

Make = Callable[..., Runner]
ONE = Policy(triggers=("victim",), ladder=("trigger",))
(VICTIM,) = kit.runtime(ONE).triggers
T = list(VICTIM.spaced)
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
CORRECTED = [*CUE, *T, *CALM, EOS]


@pytest.fixture(params=["closed", "open"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return ONE.model_copy(update={"fail_mode": request.param})


def play(it: Runner, steps: int) -> None:
    for _ in range(steps):
        it.step()


def check_sound(it: Runner) -> None:
    """Whatever broke before, the next request is corrected and its trace is written."""
    it.add("sound", [*CUE, *CALM])
    play(it, len(CORRECTED))
    it.close()
    assert it.output["sound"] == CORRECTED
    trace = it.traces()["sound"]
    assert (trace.output_ids, trace.receipt.clean) == (CORRECTED, True)


class Faulty(kit.WordDetector):
    """Answers a batch as `fault` does, and as ever once there is none; `context` breaks on the request."""

    def __init__(self, fault: Callable[[int], Any] | None = None, *, context: bool = False) -> None:
        super().__init__()
        self.fault, self.context = fault, context

    def request(self, *messages: str) -> RequestContext:
        if self.context:
            raise RuntimeError("no context")
        return super().request(*messages)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        found = super().score_batch(asked)
        return found if self.fault is None else self.fault(len(asked))


def raising(error: Exception) -> Callable[[int], NoReturn]:
    def fault(count: int) -> NoReturn:
        raise error

    return fault


#: What a detector answers, and what the receipt says of each step; None: nothing but that it was not scored.
FAULTS: dict[str, tuple[Callable[[int], Any], str | None]] = {
    "raises": (raising(RuntimeError("no score")), "detector: RuntimeError: no score"),
    "times out": (raising(TimeoutError("60 s")), "detector: TimeoutError: 60 s"),
    "runs out of memory": (raising(MemoryError()), "detector: MemoryError: "),
    "answers NaN": (lambda n: np.full(n, np.nan, np.float32), None),
    "answers infinity": (lambda n: np.full(n, np.inf, np.float32), None),
    "answers no probability": (lambda n: np.full(n, -0.5, np.float32), None),
    "answers too little": (lambda n: np.zeros(n - 1, np.float32), "detector: ValueError: 0 scores for 1 steps"),
    "answers too much": (lambda n: np.zeros(n + 1, np.float32), "detector: ValueError: 2 scores for 1 steps"),
    "answers None": (lambda n: None, "detector: TypeError: object of type 'NoneType' has no len()"),
    "answers words": (lambda n: ["high"] * n, "detector: ValueError: could not convert string to float: 'high'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_detector_cannot_score_is_answered_by_the_fail_mode(either: Make, policy: Policy, name: str) -> None:
    fault, said = FAULTS[name]
    detector = Faulty(fault)
    it = either(policy, detector)
    it.add("x", [*CALM, *CALM])
    closed = policy.fail_mode == "closed"
    wanted = [*CALM, *T, *CALM, EOS] if closed else [*CALM, *CALM, EOS]
    play(it, len(wanted))
    it.close()
    assert it.output["x"] == wanted
    receipt = it.traces()["x"].receipt
    assert (receipt.seen, receipt.scored, receipt.unscored, receipt.clean) == (2, 0, 2, False)
    assert receipt.errors == ([] if said is None else [said] * 2)
    assert [(i.at, i.score, i.completed) for i in receipt.interventions] == [(len(CALM), None, True)] * closed
    detector.fault = None
    check_sound(it)


@pytest.mark.parametrize("part", ["detector", "reader"])
def test_a_request_that_cannot_be_read_leaves_its_steps_unscored(either: Make, policy: Policy, part: str) -> None:
    detector = Faulty(context=part == "detector")
    it = either(policy, detector)
    reader = it.guard._reader
    if part == "reader":
        it.guard._reader = object()  # type: ignore[assignment]
    it.add("x", [*CALM, *CALM])
    wanted = [*CALM, *T, *CALM] if policy.fail_mode == "closed" else [*CALM, *CALM]
    play(it, len(wanted))
    it.close()
    assert it.output["x"] == wanted
    trace = it.traces()["x"]
    assert (trace.receipt.seen, trace.receipt.unscored) == (2, 2)
    said = {"detector": "RuntimeError: no context", "reader": "AttributeError: 'object' object has no attribute"}
    assert [error[: len(said[part]) + 9] for error in trace.receipt.errors] == [f"request: {said[part]}"]
    detector.context, it.guard._reader = False, reader
    check_sound(it)


def test_a_slow_detector_decides_the_same(either: Make, policy: Policy) -> None:
    # No clock decides anything: tensor-parallel ranks would part.
    class Slow(kit.WordDetector):
        def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
            time.sleep(0.2)
            return super().score_batch(asked)

    check_sound(either(policy, Slow()))


#: Method of the monitor that fails -> what the request still says under `closed`, and what its receipt says.
BUGS = {
    "observe": ([CUE[0], EOS], ["observe: RuntimeError: a bug"]),
    # Its step is still pending when the request ends, and is tried again.
    "decide": ([*CUE, EOS], ["decide: RuntimeError: a bug"] * 2),
    "finish": (CORRECTED, None),
}


@pytest.mark.parametrize("method", BUGS)
def test_a_bug_in_the_monitor_ends_or_frees_one_request_alone(
    either: Make, policy: Policy, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said, errors = BUGS[method]
    works = getattr(StepMonitor, method)

    def fails(monitor: StepMonitor, *args: Any) -> Any:
        if monitor.receipt.guard_id == "x":
            raise RuntimeError("a bug")
        return works(monitor, *args)

    monkeypatch.setattr(StepMonitor, method, fails)
    it = either(policy)
    it.add("x", [*CUE, *CALM])
    it.add("beside", [*CUE, *CALM])
    play(it, len(CORRECTED))
    it.close()
    free = CORRECTED if method == "finish" else [*CUE, *CALM]
    wanted = said if policy.fail_mode == "closed" else free
    assert it.output["x"] == [*wanted, *[EOS] * 99][: len(CORRECTED)]
    assert it.output["beside"] == CORRECTED
    traces = it.traces()
    assert traces["beside"].receipt.clean
    if errors is None:
        assert "x" not in traces
        assert "trace x was not written: a bug" in caplog.text
    else:
        assert traces["x"].output_ids == it.output["x"]
        assert traces["x"].receipt.errors == errors
    check_sound(it)


def test_a_placeholder_breaks_the_guard_and_closed_ends_the_request(either: Make, policy: Policy) -> None:
    it = either(policy)
    it.add("x", CUE)
    it.add("beside", [*CUE, *CALM])
    play(it, 2)
    it.say("x", [-1])
    play(it, len(CORRECTED) - 2)
    it.close()
    rest = [EOS] * len(CORRECTED) if policy.fail_mode == "closed" else [*CUE[2:], *[EOS] * len(CORRECTED)]
    assert it.output["x"] == [*CUE[:2], -1, *rest][: len(CORRECTED) + 1]
    receipt = it.traces()["x"].receipt
    assert receipt.errors == ["the engine showed a placeholder instead of a token (async scheduling)"]
    assert it.output["beside"] == CORRECTED
    assert it.traces()["beside"].receipt.clean
    check_sound(it)


def test_a_request_that_was_not_obeyed_says_so_and_closed_ends_it(either: Make, policy: Policy) -> None:
    it = either(policy)
    it.add("x", [*CUE, *CALM])
    play(it, len(CUE))
    it.say("x", CALM[:1])
    play(it, 2)
    it.close()
    assert it.output["x"][len(CUE) + 1 :] == ([EOS, EOS] if policy.fail_mode == "closed" else CALM[:2])
    receipt = it.traces()["x"].receipt
    assert receipt.enforcement_failed == 1
    assert receipt.errors == [f"engine appended {CALM[0]} where {T[0]} was forced"]
    check_sound(it)


def gone(spool: Path) -> None:
    shutil.rmtree(spool)


def in_its_place(spool: Path) -> None:
    shutil.rmtree(spool)
    spool.write_text("a file")


def full(spool: Path) -> None:
    (path,) = spool.iterdir()
    path.unlink()
    path.symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("breaks", "said"),
    [(gone, "No such file or directory"), (in_its_place, "Not a directory"), (full, "No space left on device")],
)
def test_a_spool_that_fails_is_logged_and_the_engine_goes_on(
    either: Make, policy: Policy, breaks: Callable[[Path], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    it = either(policy)
    check_sound(it)
    breaks(it.spool)
    with caplog.at_level(logging.ERROR, "guard"):
        it.add("x", [*CUE, *CALM])
        play(it, len(CORRECTED))
        it.close()
    assert it.output["x"] == CORRECTED
    (line,) = caplog.messages
    assert line.startswith("trace x was not written: [Errno ")
    assert said in line
    # Room again.
    shutil.rmtree(it.spool) if it.spool.is_dir() else it.spool.unlink(missing_ok=True)
    it.spool.mkdir()
    it.add("y", [*CUE, *CALM])
    play(it, len(CORRECTED))
    it.close()
    assert it.traces().keys() == {"y"}
    assert it.output["y"] == CORRECTED


def test_a_bug_in_the_spool_is_logged_too(either: Make, caplog: pytest.LogCaptureFixture) -> None:
    it = either(ONE)
    it.guard._spool = object()  # type: ignore[assignment]
    it.add("x", CALM)
    play(it, 2)
    it.close()
    assert "trace x was not written: 'object' object has no attribute 'append'" in caplog.text


def test_a_probe_is_no_proof_when_the_detector_fails(either: Make) -> None:
    it = either(Policy(fail_mode="open"), Faulty(FAULTS["answers NaN"][0]), secret="s3cret")
    it.add("p", CALM, guard_probe="s3cret")
    play(it, 3)
    it.close()
    assert it.output["p"] == CALM[:3]
    assert it.traces()["p"].receipt.interventions == []
