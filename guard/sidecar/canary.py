"""A new detector beside the one in force: for a share of the requests it reads the same steps, and decides nothing.

It reads finished traces, in a thread of its own: no response waits for it, and nothing of it reaches an engine. What
both would have flagged first is exact, since up to there both read the same text; behind a trigger stands what the
model wrote under that trigger.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from classifiers.artifact import fingerprint
from classifiers.detector import Detector
from classifiers.stats import Rate
from guard.errors import UserError
from guard.prompt import PromptReader
from guard.replay import Replayer, skip_reason
from guard.replay_report import FirstCue, first_cue, recorded_cue, written
from guard.runtime import GuardRuntime
from guard.sidecar.metrics import Metrics
from guard.sidecar.proof import Proof
from guard.traces import Trace

log = logging.getLogger(__name__)

PERCENT = 10.0
WAITING = 64
"""Traces that wait at most; one more is dropped, and counted."""
NEWEST = 20
"""Requests on which both differ that are remembered."""
Result = Literal["neither", "same", "earlier", "later", "only_in_force", "only_canary"]
"""Where the canary flagged a request first, seen from the detector in force."""
RESULTS: tuple[Result, ...] = get_args(Result)
LeftOut = Literal["dropped", "skipped", "error"]
"""Why a chosen request was not compared: too many waited, its trace cannot be decided again, the canary failed."""


@dataclass(frozen=True)
class Canary:
    """A new detector, and of how many requests in a hundred it sees the steps."""

    detector: Detector
    fingerprint: str
    percent: float

    @classmethod
    def load(cls, path: Path, percent: float = PERCENT) -> Self:
        """Loads and tries it. UserError for an artifact that is missing, damaged, or scores nothing."""
        named, detector = fingerprint(path), Detector.load(path)
        try:
            for first_tier in (True, False):
                detector.score(detector.request("What is 2 + 2?"), ["The answer is 4."], first_tier=first_tier)
        except Exception as error:
            raise UserError(f"The canary {path} cannot score a step", got=f"{type(error).__name__}: {error}") from error
        return cls(detector, named, percent)

    def watches(self, guard_id: str) -> bool:
        """Whether it is shown a request: a pure function of the guard id. A larger share adds requests to a smaller."""
        return int.from_bytes(hashlib.sha256(guard_id.encode()).digest()[:8]) < self.percent / 100 * 2**64


class Compared(NamedTuple):
    """What both made of one request."""

    result: Result
    in_force: FirstCue | None
    canary: FirstCue | None
    steps: int
    """That the canary scored."""


@dataclass(frozen=True)
class Differing:
    """A request that both flagged at another step, or only one of them."""

    guard_id: str
    result: Result
    in_force: int | None
    """The first cue's step, among those that the model wrote."""
    canary: int | None


@dataclass
class Figures:
    """What one canary was found to do beside one detector in force."""

    canary: Canary
    in_force: Detector
    results: Counter[Result] = field(default_factory=Counter)
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    steps: int = 0
    differing: deque[Differing] = field(default_factory=lambda: deque(maxlen=NEWEST))
    """The newest first."""
    problem: str | None = None
    """The kind of the last error, until a request is compared again."""

    @property
    def shares(self) -> dict[str, Rate]:
        """Shares of the compared requests: each result's, `agree` (both flag the same step, or none), and what each
        detector flags, `in_force` and `canary`."""
        n, found = sum(self.results.values()), self.results
        sums = {
            "agree": found["same"] + found["neither"],
            "in_force": n - found["neither"] - found["only_canary"],
            "canary": n - found["neither"] - found["only_in_force"],
        }
        return {name: Rate.of(k, n) for name, k in sums.items()} | {each: Rate.of(found[each], n) for each in RESULTS}


class Comparer:
    """Shows finished requests to the canary, one after the other."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(1, "canary")
        self._room = threading.BoundedSemaphore(WAITING)
        self._lock = threading.Lock()
        self._figures: Figures | None = None

    def use(self, canary: Canary | None, in_force: Detector) -> None:
        """Compares these two from now on; the figures begin anew where one of them is another."""
        old = self._figures
        if canary is None:
            self._figures = None
        elif old is None or (old.canary, old.in_force) != (canary, in_force):
            self._figures = Figures(canary, in_force)

    @property
    def canary(self) -> Canary | None:
        """The one in use."""
        return None if self._figures is None else self._figures.canary

    def figures(self) -> Figures | None:
        """A copy of what was found so far; None without a canary."""
        with self._lock:
            found = self._figures
            return found and Figures(
                found.canary, found.in_force, found.results.copy(), found.left_out.copy(), found.steps,
                copy.copy(found.differing), found.problem,
            )  # fmt: skip

    def offer(self, proof: Proof, runtime: GuardRuntime) -> None:
        """Takes a finished response if the canary sees it, or drops it when too many wait. Never blocks, never raises.

        `runtime`: under which it was decided. What is not proven says nothing about a detector.
        """
        figures, trace = self._figures, proof.trace
        if figures is None or trace is None or proof.broken or not figures.canary.watches(trace.guard_id):
            return
        if runtime.detector is not figures.in_force or (skip_reason(trace, runtime) or trace.log_content != "full"):
            self._leave_out(figures, "skipped")
        elif not self._room.acquire(blocking=False):
            self._leave_out(figures, "dropped")
        else:
            # Closed while the last responses end.
            with contextlib.suppress(RuntimeError):
                self._pool.submit(self._work, figures, trace, runtime, proof.attached.mode)

    def close(self) -> None:
        """Lets the one at hand end, and forgets those that wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, figures: Figures, trace: Trace, runtime: GuardRuntime, mode: str) -> None:
        try:
            self._count(figures, trace, mode, compare(trace, runtime, figures.canary.detector))
        except Exception as error:  # noqa: BLE001 - a canary that fails is a finding, and stops nothing
            kind = type(error).__name__
            if figures.problem != kind:
                log.warning("the canary %s failed: %s", figures.canary.fingerprint, kind)
            self._leave_out(figures, "error", kind)
        finally:
            self._room.release()

    def _count(self, figures: Figures, trace: Trace, mode: str, found: Compared) -> None:
        named, receipt, metrics = figures.canary.fingerprint, trace.receipt, self._metrics
        with self._lock:
            figures.results[found.result] += 1
            figures.steps += found.steps
            figures.problem = None
            if found.result not in ("same", "neither"):
                places = (None if cue is None else cue.step for cue in (found.in_force, found.canary))
                figures.differing.appendleft(Differing(trace.guard_id, found.result, *places))
        metrics.canary_requests.labels(named, receipt.policy, mode, found.result).inc()
        metrics.canary_steps.labels(named).inc(found.steps)
        about = {"policy": receipt.policy, "policy_hash": receipt.policy_hash, "mode": mode}
        log.info("canary", extra={"event": "canary", "guard_id": trace.guard_id, "result": found.result, **about,
                                  "detector": receipt.detector, "canary": named})  # fmt: skip

    def _leave_out(self, figures: Figures, why: LeftOut, problem: str | None = None) -> None:
        with self._lock:
            figures.left_out[why] += 1
            figures.problem = problem or figures.problem
        self._metrics.canary_left_out.labels(figures.canary.fingerprint, why).inc()


def compare(trace: Trace, runtime: GuardRuntime, detector: Detector) -> Compared:
    """What a detector makes of a trace that was decided under `runtime`: same policy, same steps, same tokens."""
    view = runtime.under(runtime.policy, detector)
    # A replayer keeps contexts of requests, and a server's never end: one for each.
    steps = Replayer(view, PromptReader(view.table, view.grammar, (), ())).shadow(trace).steps
    before, now = recorded_cue(trace), first_cue(steps)
    return Compared(_result(before, now), before, now, len(written(steps)))


def _result(in_force: FirstCue | None, canary: FirstCue | None) -> Result:
    if in_force is None:
        return "neither" if canary is None else "only_canary"
    if canary is None:
        return "only_in_force"
    if canary.step == in_force.step:
        return "same"
    return "earlier" if canary.step < in_force.step else "later"
