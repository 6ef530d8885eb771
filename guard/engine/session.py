"""What both engine adapters share: settings, scoring, containment of errors, writing traces.

Nothing in here may raise into the engine. An error while a request runs is recorded on its receipt and answered by
the policy's fail mode: `closed` ends the request, `open` lets it go on unguarded and flagged.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from classifiers.detector import Asked, Detector, RequestContext
from guard.engine.hardware import encoder_workers
from guard.engine.params import RequestArgs
from guard.engine.settings import EngineSettings
from guard.engine.views import Views
from guard.monitor import StepMonitor
from guard.policy import load_policy
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.traces import GuardTime, Spool, Trace, us_since
from guard.weights import LoadedWeights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

#: A probe's first token is a step of its own and counts as a cue, whatever zone and mode the policy has.
PROBE_POLICY = {
    "name": "probe",
    "zones": ("reasoning", "answer"),
    "max_step_tokens": 1,
    "ladder": ("trigger",),
    "shadow": False,
    # Its text is ours, and the proof reads the trigger's ids.
    "log_content": "full",
}


class GuardedRequest:
    """One request under guard: its monitor, and what happens when something in the guard breaks."""

    def __init__(
        self,
        monitor: StepMonitor,
        context: RequestContext | None,
        prompt: list[int],
        *,
        end_id: int | None,
        probe: bool,
        detector: Detector,
        tenant: str = "",
        spent: GuardTime | None = None,
    ) -> None:
        self.monitor = monitor
        self.context = context
        """None: the detector failed on the request, so that no step of it can be scored."""
        self.prompt = prompt
        self.probe = probe
        self.detector = detector
        self.tenant = tenant
        self.spent = spent or GuardTime()
        self._end_id = end_id
        self._closed = monitor.policy.fail_mode == "closed"
        self._broken = False

    @property
    def broken(self) -> bool:
        """Whether the guard broke on this request, which is then unguarded or ended."""
        return self._broken

    @property
    def forced(self) -> int | None:
        """The id to force; a request whose guard broke under fail mode `closed` must end."""
        if self._broken:
            return self._end_id if self._closed else None
        return self.monitor.forced

    @property
    def planned(self) -> tuple[int, ...]:
        """The ids to force from here on, the next one first."""
        if self._broken:
            return (self._end_id,) if self._closed and self._end_id is not None else ()
        return self.monitor.planned

    def observe(self, token: int) -> bool:
        """Feeds one token; True when a step is pending."""
        if self._broken:
            return False
        if token < 0:
            self.break_guard("the engine showed a placeholder instead of a token (async scheduling)")
            return False
        monitor = self.monitor
        try:
            monitor.observe(token)
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            self.break_guard(f"observe: {type(error).__name__}: {error}")
            return False
        if monitor.outvoted and self._closed:
            # Something in the engine overrules the guard: what comes next cannot be corrected either.
            self._broken = True
            return False
        return monitor.pending is not None

    @property
    def room(self) -> int:
        """How many quiet ids may be left aside: see `StepMonitor.room`; none once the guard broke."""
        return 0 if self._broken else self.monitor.room

    def pass_quiet(self, tokens: list[int]) -> None:
        """Feeds ids that were left aside."""
        try:
            self.monitor.pass_quiet(tokens)
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            self.break_guard(f"pass_quiet: {type(error).__name__}: {error}")

    def decide(self, score: float | None) -> None:
        """Answers the pending step."""
        try:
            self.monitor.decide(score)
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            self.break_guard(f"decide: {type(error).__name__}: {error}")

    def refuse_force(self, reason: str) -> None:
        """The forced id cannot be emitted: the intervention is given up, and recorded."""
        if not self._broken:
            self.monitor.abandon(reason)

    def break_guard(self, reason: str) -> None:
        """From here on this request cannot be guarded."""
        self._broken = True
        self.monitor.fail(reason)
        log.error("guard broke on %s: %s", self.monitor.receipt.guard_id, reason)


class EngineGuard:
    """One engine process's guard: opens requests, scores steps in batches, closes requests into the spool."""

    def __init__(
        self,
        config: EngineSettings,
        runtime: GuardRuntime,
        reader: PromptReader,
        engine: str,
        *,
        writes: bool = True,
        weights: LoadedWeights | None = None,
    ) -> None:
        self.config = config
        self._runtime, self._reader, self._engine = runtime, reader, engine
        self.loud = runtime.loud
        self._weights = weights or LoadedWeights(lambda: runtime.model)
        self._weights.now()
        self._spool = Spool(config.spool) if writes else None
        self._views = Views(runtime, config.secret, config.detectors)

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig, engine: str) -> EngineGuard:
        """Builds the guard from vLLM's own configuration. Errors here stop the engine's start, with the reason."""
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        additional = vllm_config.additional_config
        settings = additional.get("reasonguard") if isinstance(additional, dict) else None
        if settings is None:
            raise ValueError(
                "the guard's settings are missing: start vLLM through `cli.py serve`, or pass "
                '--additional-config \'{"reasonguard": {"spool": "DIR"}}\''
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("the guard cannot enforce under speculative decoding: start without --speculative-config")
        config = EngineSettings.received(settings)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        backend = tokenizer.backend_tokenizer
        runtime = GuardRuntime.build(
            load_policy(config.policy), Detector.load(config.detector, encoder_workers()), backend,
            str(vllm_config.model_config.model), int(tokenizer.eos_token_id),
        )  # fmt: skip
        reader = PromptReader.build(tokenizer, runtime.table, runtime.grammar)
        weights = LoadedWeights(lambda: str(vllm_config.model_config.model))
        return cls(config, runtime, reader, engine, writes=_is_first_rank(), weights=weights)

    def open(self, prompt: list[int], guard_id: str, args: RequestArgs | None = None) -> GuardedRequest:
        """Starts guarding a request: reads what was asked and where generation starts from the prompt's ids."""
        args, began = args or RequestArgs(), time.perf_counter_ns()
        is_probe = self._views.is_secret(args.guard_probe)
        broken: list[str] = []
        runtime = self._views.of(args, broken)
        context, asked, zones = None, "", runtime.zones(runtime.policy.zones[0])
        try:
            asked, zones = self._reader.request(prompt), self._reader.zones(prompt)
            context = runtime.detector.request(*self._reader.messages(prompt))
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            broken.append(f"request: {type(error).__name__}: {error}")
        if is_probe:
            runtime = dataclasses.replace(runtime, policy=runtime.policy.model_copy(update=PROBE_POLICY))
        monitor = StepMonitor(runtime, asked, zones=zones, guard_id=guard_id, engine=self._engine)
        for reason in broken:
            monitor.fail(reason)
        return GuardedRequest(
            monitor, context, prompt, end_id=runtime.eos, probe=is_probe, detector=runtime.detector,
            tenant=args.guard_tenant if self._views.vouched(args) else "", spent=GuardTime(request=us_since(began)),
        )  # fmt: skip

    def stands_aside(self, args: RequestArgs) -> bool:
        """Whether a request goes unguarded here: the sidecar watches it, or an evaluation asked for it."""
        return (args.guard_off and self.config.allow_off) or self._views.is_secret(args.guard_aside)

    def score(self, requests: Sequence[GuardedRequest]) -> None:
        """Decides all pending steps, in one batch per detector. A failing one leaves a step unscored (fail mode)."""
        began, groups = time.perf_counter_ns(), dict[int, list[GuardedRequest]]()
        for item in requests:
            if item.monitor.pending is not None:
                groups.setdefault(id(item.detector), []).append(item)
        for group in groups.values():
            self._decide(group[0].detector, group)
        # Two looks at the clock a round, none a token.
        took = us_since(began)
        for group in groups.values():
            for item in group:
                item.spent.steps.append(took)

    def _decide(self, detector: Detector, requests: Sequence[GuardedRequest]) -> None:
        asked = [(item, _asked(item)) for item in requests]
        scores = iter(_scores(detector, [each for _, each in asked if each is not None]))
        for item, each in asked:
            score: float | None = None
            if each is not None:
                found = next(scores)
                score = found if isinstance(found, float) else None
                if score is None:
                    item.monitor.fail(f"detector: {found}")
                elif item.probe and not item.monitor.steps and math.isfinite(score):
                    score = 1.0
            item.decide(score)

    def close(self, item: GuardedRequest, output: Sequence[int]) -> None:
        """Ends a request: judges its unfinished step and writes its trace. What fails is logged, never raised."""
        guard_id = item.monitor.receipt.guard_id
        try:
            item.monitor.finish()
            self.score([item])
            model, weights = self._weights.now()
            trace = Trace(
                guard_id=guard_id,
                created=time.time(),
                model=model,
                weights=weights,
                tokenizer_hash=self._runtime.tokenizer_hash,
                request=item.monitor.request,
                tenant=item.tenant,
                prompt_ids=item.prompt,
                output_ids=[int(t) for t in output],
                steps=item.monitor.steps,
                receipt=item.monitor.receipt,
                guard_time=item.spent,
            )
            if self._spool is not None:
                self._spool.append(trace.keeping(item.monitor.policy.log_content))
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            log.error("trace %s was not written: %s", guard_id, error)


def _scores(detector: Detector, asked: list[Asked]) -> Sequence[float | str]:
    """A score for each, or what went wrong; where the batch fails, each step is tried by itself."""
    try:
        return _batch(detector, asked)
    except Exception:  # noqa: BLE001 - nothing may reach the engine
        return [_alone(detector, each) for each in asked]


def _alone(detector: Detector, asked: Asked) -> float | str:
    try:
        return _batch(detector, [asked])[0]
    except Exception as error:  # noqa: BLE001 - nothing may reach the engine
        return f"{type(error).__name__}: {error}"


def _batch(detector: Detector, asked: list[Asked]) -> list[float]:
    if not asked:
        return []
    found = detector.score_batch(asked)
    if len(found) != len(asked):
        raise ValueError(f"{len(found)} scores for {len(asked)} steps")
    return [float(score) for score in found]


def _asked(item: GuardedRequest) -> Asked | None:
    step = item.monitor.pending
    if step is None or item.context is None:
        return None
    return Asked(item.context, step.text, item.monitor.previous)


def _is_first_rank() -> bool:
    """Tensor-parallel ranks all decide, and decide the same; one of them writes."""
    from vllm.distributed import parallel_state

    return not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
