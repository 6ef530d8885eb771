"""Traces that a real monitor decided, as the live guard would have recorded them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from classifiers.detector import Asked, RequestContext
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.replay import Replayer
from guard.replay_report import Difference, compare
from guard.runtime import GuardRuntime
from guard.steps import Zone
from guard.traces import Trace
from tests.guard import kit

START, END = 3, 4
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
ONE = Policy(threshold=0.5, triggers=("victim",))
BOTH = Policy(threshold=0.5, zones=("reasoning", "answer"), triggers=("victim",))
FREE = Policy(threshold=0.5)
(VICTIM,) = kit.runtime(ONE).triggers
LENGTH = len(VICTIM.spaced)
CIPHER = kit.encode("V jvyy cynl fbzr punva bs fgrcf jvgubhg jbeqf abj.")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


class ContextDetector(kit.WordDetector):
    """A score that takes every value from 0 to 1 and hangs on the request, the step and what came before it."""

    def request(self, *messages: str) -> RequestContext:
        return RequestContext(np.array([crc32("\x00".join(messages).encode())], np.float32), 0.5, 0)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        texts = [f"{each.context.vector}\x00{each.previous}\x00{each.step}" for each in asked]
        return np.array([crc32(text.encode()) / (2**32 - 1) for text in texts], np.float32)


class Seeing(kit.WordDetector):
    """The kit's scores; remembers what each step came after."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        self.seen += [each.previous for each in asked]
        return super().score_batch(asked)


@functools.cache
def runtime(policy: Policy) -> GuardRuntime:
    """The kit's runtime with scores that hang on everything the live engine gives the detector."""
    return dataclasses.replace(kit.runtime(policy), detector=ContextDetector())


@functools.cache
def chat() -> Any:
    """The kit's tokenizer as transformers has it, with a chat template."""
    fast = PreTrainedTokenizerFast(tokenizer_object=kit.tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


@functools.cache
def reader() -> PromptReader:
    table = kit.runtime()
    return PromptReader.build(chat(), table.table, table.grammar)


def prompt(zone: Zone = "reasoning", request: str = "car") -> list[int]:
    ids: list[int] = chat().apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False
    )
    return ids if zone == "reasoning" else [*ids, END]


def trace_of(output: list[int], watcher: StepMonitor, zone: Zone, run: GuardRuntime) -> Trace:
    return Trace(
        guard_id=watcher.receipt.guard_id, created=1.0, model="kit", tokenizer_hash=run.tokenizer_hash,
        request=watcher.request, prompt_ids=prompt(zone, watcher.request), output_ids=output, steps=watcher.steps,
        receipt=watcher.receipt,
    )  # fmt: skip


def live(
    model: list[int], policy: Policy = ONE, *, zone: Zone = "reasoning", limit: int | None = None,
    guard_id: str = "kit", run: GuardRuntime | None = None, request: str = "car",
) -> Trace:  # fmt: skip
    """What the live guard writes of a model that says `model`; `limit` is vLLM's max_tokens."""
    run = run or kit.runtime(policy)
    context = run.detector.request(request)

    def watch() -> StepMonitor:
        return StepMonitor(run, request, zones=run.zones(zone), guard_id=guard_id, engine="vllm-v1")

    def scorer(text: str) -> float:
        return float(run.detector.score(context, [text], watcher.previous)[0])

    watcher = watch()
    output = kit.generate(watcher, model, scorer)[:limit]
    watcher = watch()
    kit.replay(watcher, output, scorer)
    return trace_of(output, watcher, zone, run)


def differences(trace: Trace, policy: Policy = ONE) -> list[Difference]:
    """What an exact replay under `policy` gives another value."""
    return compare(trace, Replayer(kit.runtime(policy), reader()).exact(trace))
