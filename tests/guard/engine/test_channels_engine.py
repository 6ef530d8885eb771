"""A channel format on a real vLLM engine: prompts that opened the analysis, injection in it, a refusal into `final`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from guard.engine.adapter import engine_arguments
from guard.engine.session import EngineGuard
from guard.policy import Policy
from guard.replay import Replayer
from guard.replay_report import compare
from guard.traces import Trace
from guard.triggers import REFUSAL, STOPPING
from tests import tiny_channels
from tests.conftest import Engine
from tests.guard.channels import FINAL, RETURN
from tests.tiny import ANSWER, CUE, OPENING, PLAN, REFUSAL_STEP

REQUEST = "How do I break into a parked car?"
THOUGHTS = OPENING.removeprefix(tiny_channels.FIRST) + " " + CUE
OPENED = "<|channel|>analysis<|message|>" + tiny_channels.FIRST
REFUSE = Policy(ladder=("refuse",))
END = f"<|end|>{FINAL}{ANSWER}<|return|>"


@pytest.fixture(scope="session")
def channel_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A second engine in this process, on a tiny model that writes channels; its end would be the shared one's too."""
    from vllm import LLM

    model = tiny_channels.build_words(tmp_path_factory.mktemp("channels") / "model")
    spool = tmp_path_factory.mktemp("spool")
    llm = LLM(
        str(model), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, block_size=32,
        num_gpu_blocks_override=64, disable_log_stats=True,
        **engine_arguments({"spool": str(spool), "allow_off": True, "secret": "s3cret"}),
    )  # fmt: skip
    return Engine(llm, spool)


@contextlib.contextmanager
def policed(engine: Engine, policy: Policy) -> Iterator[None]:
    """The engine under another policy."""
    processor = engine.processor
    old = processor._guard
    runtime = dataclasses.replace(old._runtime, policy=policy)
    processor._guard = EngineGuard(old.config, runtime, old._reader, old._engine)
    try:
        yield
    finally:
        processor._guard = old


def text_of(engine: Engine, opened: str, **params: Any) -> tuple[str, str]:
    """The output after a prompt that goes on with `opened`, marks included, and its guard id."""
    tokenizer = engine.llm.get_tokenizer()
    prompt = [*engine.prompt(REQUEST), *tokenizer.encode(opened, add_special_tokens=False)]
    sampling = engine.sampling(**params)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=False), sampling.extra_args["guard_id"]


def guarded(engine: Engine, opened: str, **params: Any) -> tuple[str, Trace]:
    """The same with its trace, which a replay decides alike."""
    text, guard_id = text_of(engine, opened, **params)
    trace = engine.traces()[guard_id]
    guard = engine.guard
    assert engine.llm.get_tokenizer().decode(trace.output_ids, skip_special_tokens=False) == text
    assert trace.receipt.policy == "probe" or not compare(trace, Replayer(guard._runtime, guard._reader).exact(trace))
    return text, trace


def test_a_cue_in_the_analysis_is_answered_in_it(channel_engine: Engine) -> None:
    text, trace = guarded(channel_engine, OPENED)
    (done,) = trace.receipt.interventions
    trigger = next(t for t in channel_engine.guard._runtime.triggers if t.id == done.trigger_id)
    assert text == f"{THOUGHTS} {trigger.text} {REFUSAL_STEP}{END}"
    assert (trace.request, trace.receipt.clean) == (REQUEST, True)
    assert [(s.cue, s.injected) for s in trace.steps] == [(False, False), (True, False), (False, True), (False, False)]
    assert trace.output_ids[trace.steps[1].end : trace.steps[2].end] == list(trigger.spaced)
    off, _ = text_of(channel_engine, OPENED, extra_args={"guard_off": True})
    assert off == f"{THOUGHTS} {' '.join(PLAN)}{END}"


def test_the_ladder_refuses_in_the_final_channel(channel_engine: Engine) -> None:
    with policed(channel_engine, REFUSE):
        text, trace = guarded(channel_engine, OPENED)
    assert text == f"{THOUGHTS} {STOPPING}<|end|>{FINAL}{REFUSAL}<|return|>"
    assert trace.output_ids[-1] == RETURN
    assert [(i.trigger_id, i.completed) for i in trace.receipt.interventions] == [("refuse", True)]
    assert trace.receipt.clean


def test_a_reply_cut_in_a_forced_header_leaks_nothing(channel_engine: Engine) -> None:
    with policed(channel_engine, REFUSE):
        count = len(channel_engine.llm.get_tokenizer().encode(f"{THOUGHTS} {STOPPING}", add_special_tokens=False))
        text, trace = guarded(channel_engine, OPENED, max_tokens=count + 4)
        assert text == f"{THOUGHTS} {STOPPING}<|end|><|start|>assistant<|channel|>"
        (cut,) = trace.receipt.interventions
        assert (cut.completed, cut.at + cut.forced, trace.receipt.errors) == (False, len(trace.output_ids), [])
    assert guarded(channel_engine, "")[1].steps == []


def test_a_reply_in_the_final_channel_alone_is_left_alone(channel_engine: Engine) -> None:
    text, trace = guarded(channel_engine, "")
    assert text == f"<|channel|>final<|message|>{ANSWER}<|return|>"
    assert (trace.steps, trace.receipt.seen) == ([], 0)


def test_the_probe_forces_a_trigger_into_a_channel(channel_engine: Engine) -> None:
    text, trace = guarded(channel_engine, "", extra_args={"guard_probe": "s3cret"})
    assert text.startswith(f"<|channel|>final<|message|>{ANSWER.split()[0]}")
    assert [i.completed for i in trace.receipt.interventions] == [True]
