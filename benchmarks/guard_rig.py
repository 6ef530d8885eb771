"""What `benchmarks.guard` measures: engines in this process, and an adapter without one.

Imports vLLM, which reads its environment then: `benchmarks.guard` sets that first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from classifiers.detector import Asked, Detector, RequestContext
from classifiers.normalise import _VIEWS
from guard.engine.adapter import engine_arguments
from guard.engine.hardware import fast_dtype
from guard.engine.session import EngineGuard
from guard.engine.v1 import GuardV1
from guard.engine.v2 import GuardV2
from guard.traces import read_traces

KV_BYTES = 2**29
MAX_LEN = 512
SAID = 1e6
"""Logit of what a scripted row says next."""


class FirstTier(Detector):
    """A detector whose first tier clears every step; the encoder is never asked."""

    def request(self, *messages: str) -> RequestContext:
        """The least risky context."""
        return RequestContext(np.zeros(1, np.float32), 0.0, 0)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        """The score of a cleared step, after the work of clearing it."""
        self.first_tier([each.step for each in asked])
        return np.array([self.manifest.cleared_score[each.context.bucket] for each in asked], np.float32)


class ScriptedText(LogitsProcessor):  # type: ignore[misc]  # vLLM is not followed
    """Makes rows say `text` from `extra_args["script"]` on, whatever the model would; the forward pass is paid."""

    text: ClassVar[list[int]] = []

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it decides the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows rows as they are removed, added and moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            self._rows.pop(index, None)
            if "script" in (params.extra_args or {}):
                self._rows[index] = (params.extra_args["script"], tokens)
        for source, target, direction in batch_update.moved:
            moving, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if other is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Writes one logit a row, all rows at once."""
        if self._rows:
            size = len(self.text)
            said = [self.text[(start + len(tokens)) % size] for start, tokens in self._rows.values()]
            logits[list(self._rows), said] = SAID
        return logits


class Clock:
    """Host seconds inside a logits processor, engine step by engine step."""

    def __init__(self, processor: GuardV1 | GuardV2) -> None:
        self._steps: list[float] = []
        first = "update_state" if isinstance(processor, GuardV1) else "apply_staged_writes"
        for name in (first, "apply"):
            setattr(processor, name, self._timed(getattr(processor, name), opens=name == first))

    def take(self) -> list[float]:
        """The seconds of each engine step since the last call: what comes before the forward pass, and `apply`."""
        steps, self._steps = self._steps, []
        return steps

    def _timed(self, call: Callable[..., Any], *, opens: bool) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            took = time.perf_counter() - start
            if opens:
                self._steps.append(took)
            else:
                self._steps[-1] += took
            return result

        return timed


@dataclass(frozen=True)
class Run:
    """One batch generated in lockstep, in seconds: its first engine step (the prompts) apart from the others."""

    rows: int
    first: float
    rest: float
    steps: int
    """Engine steps of `rest`, each with one new token a row."""
    guard_open: float = 0.0
    """Inside the guard in the first step: it reads the requests."""
    guard_steps: tuple[float, ...] = ()
    """Inside the guard in each later step; empty where the engine has none."""
    guard_close: float = 0.0
    """Inside the guard when the rows leave: it writes their traces."""

    @property
    def speed(self) -> float:
        """New tokens per second, without the first step."""
        return self.rows * self.steps / self.rest


class Engine:
    """One vLLM in this process; its rows are watched with one of `detectors`, or not at all."""

    #: An engine that is collected tears down what vLLM shares among all engines of a process.
    _alive: ClassVar[list[Engine]] = []

    def __init__(
        self,
        model: Path,
        settings: Mapping[str, Any] | None,
        detectors: Mapping[str, Detector],
        *,
        script: type | None = None,
        **arguments: Any,
    ) -> None:
        """`script`: a processor that says what each row's `extra_args["script"]` asks for; `arguments`: vLLM's."""
        loaded = engine_arguments(dict(settings)) if settings is not None else {}
        if script is not None:
            name = f"{script.__module__}:{script.__name__}"
            loaded["logits_processors"] = [*loaded.get("logits_processors", ()), name]
        defaults = {
            "dtype": fast_dtype(), "enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": KV_BYTES,
            "max_num_batched_tokens": 4096,
        }  # fmt: skip
        self._llm = LLM(
            str(model), max_model_len=MAX_LEN, block_size=32, enable_prefix_caching=True, seed=0,
            disable_log_stats=True, use_tqdm_on_load=False, async_scheduling=False, **defaults | arguments, **loaded,
        )  # fmt: skip
        self._alive.append(self)
        self.watched = 0
        """Requests watched so far: each must leave a trace."""
        self._serial = itertools.count()
        self._detectors = detectors
        self._clock: Clock | None = None
        self._processor: Any = None
        if settings is not None:
            self._processor = self._find_processor()
            self._guards = {name: with_detector(self._processor._guard, d) for name, d in detectors.items()}
            self._clock = Clock(self._processor)

    def run(self, prompts: Sequence[list[int]], tokens: int, watch: str | None, starts: Sequence[int]) -> Run:
        """Generates exactly `tokens` greedy tokens a prompt; `watch` names the detector, None switches the guard off.

        `starts`: where each row begins in the scripted text, of an engine that is scripted.
        """
        if watch is not None:
            self._processor._guard = self._guards[watch]
            self.watched += len(prompts)
        for detector in self._detectors.values():
            forget(detector)
        for prompt, start in zip(prompts, starts, strict=True):
            self._add(prompt, tokens, watch, {"script": start})
        self._take()
        engine, steps = self._llm.llm_engine, 0
        begin = time.perf_counter()
        engine.step()
        first = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
            steps += 1
        end = time.perf_counter()
        inside = self._take()
        if steps != tokens - 1:
            raise RuntimeError(f"rows did not run in lockstep: {steps + 1} engine steps for {tokens} tokens a row")
        return Run(
            rows=len(prompts), first=first - begin, rest=end - first, steps=steps, guard_open=sum(inside[:1]),
            guard_steps=tuple(inside[1:]), guard_close=self._flush(prompts[0]),
        )  # fmt: skip

    def _add(self, prompt: list[int], tokens: int, watch: str | None, extra: dict[str, Any]) -> None:
        name = f"{watch or 'off'}-{next(self._serial)}"
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"guard_id": name, "guard_off": watch is None, **extra},
        )  # fmt: skip
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def _flush(self, prompt: list[int]) -> float:
        """Seconds inside the guard as finished rows leave: vLLM removes them when it schedules another step. Runner V2
        does not say so: there the adapter writes them on a thread of its own once the engine rests."""
        self._add(prompt, 1, None, {})
        while self._llm.llm_engine.has_unfinished_requests():
            self._llm.llm_engine.step()
        while any(slot.row and not slot.written for slot in getattr(self._processor, "_slots", {}).values()):
            time.sleep(0.02)
        return sum(self._take())

    def _take(self) -> list[float]:
        return self._clock.take() if self._clock is not None else []

    def _find_processor(self) -> Any:
        runner = self._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        v2 = hasattr(getattr(runner, "sampler", None), "logits_processors")
        loaded = runner.sampler.logits_processors if v2 else runner.input_batch.logitsprocs.all
        (found,) = (p for p in loaded if isinstance(p, (GuardV1, GuardV2)))
        return found


def with_detector(guard: EngineGuard, detector: Detector) -> EngineGuard:
    """The same guard with another detector."""
    runtime = dataclasses.replace(guard._runtime, detector=detector)
    return EngineGuard(guard.config, runtime, guard._reader, guard._engine)


def forget(detector: Detector) -> None:
    """Empties the caches of texts: every repeat says the same, which live requests do not."""
    detector.encoder._cache.clear()
    _VIEWS.clear()


def build_fast_model(base: Path, target: Path) -> Path:
    """A model whose forward pass is nearly free, with the vocabulary and tokenizer of `base`; random weights."""
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=MAX_LEN, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, target / name)
    return target


def check_receipts(spool: Path, watched: int) -> dict[str, int]:
    """What the guard saw; RuntimeError unless it watched `watched` requests to their end and forced nothing."""
    traces, _ = read_traces(spool)
    bad = [trace.receipt for trace in traces if trace.receipt.interventions or not trace.receipt.clean]
    steps = sum(trace.receipt.scored for trace in traces)
    if len(traces) != watched or bad or not steps:
        raise RuntimeError(
            f"this was no measurement: {len(traces)} of {watched} watched requests left a trace, {steps} steps were "
            f"scored, {len(bad)} requests were intervened on or not scored throughout: {bad[:1]}"
        )
    return {"requests": watched, "tokens": sum(len(t.output_ids) for t in traces), "steps": steps, "interventions": 0}
