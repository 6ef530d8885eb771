"""Scores the steps of one request that the sidecar watches itself, in a thread, errors contained."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool

from classifiers.detector import Asked, RequestContext
from guard.monitor import StepMonitor
from guard.runtime import GuardRuntime
from guard.traces import GuardTime, us_since


class Scorer:
    """What the detector knows of one request; an error is on the monitor's receipt and answered by the fail mode."""

    def __init__(self, runtime: GuardRuntime, context: RequestContext | None, spent: int) -> None:
        self._runtime, self._context = runtime, context
        self.time = GuardTime(request=spent)
        """What the request has waited so far, for a thread too."""

    @classmethod
    async def read(cls, runtime: GuardRuntime, monitor: StepMonitor, messages: Sequence[str]) -> Scorer:
        """Reads the request, all messages of its prompt, once for all of its steps."""
        began, context = time.perf_counter_ns(), None
        try:
            context = await run_in_threadpool(runtime.detector.request, *messages)
        except Exception as error:  # noqa: BLE001 - the policy's fail mode answers it, step by step
            monitor.fail(f"request: {type(error).__name__}: {error}")
        return cls(runtime, context, us_since(began))

    async def score(self, monitor: StepMonitor) -> float | None:
        """The probability that the pending step is a cue; None where it cannot be scored."""
        began = time.perf_counter_ns()
        try:
            return await self._score(monitor)
        finally:
            self.time.steps.append(us_since(began))

    async def _score(self, monitor: StepMonitor) -> float | None:
        if self._context is None or monitor.pending is None:
            return None
        asked = Asked(self._context, monitor.pending.text, monitor.previous)
        try:
            scores = await run_in_threadpool(self._runtime.detector.score_batch, [asked])
            return float(scores[0])
        except Exception as error:  # noqa: BLE001 - the policy's fail mode answers it
            monitor.fail(f"detector: {type(error).__name__}: {error}")
            return None
