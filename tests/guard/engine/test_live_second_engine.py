"""What needs an engine started otherwise: LoRA adapters, and prompts prefilled in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Engine, Reply
from tests.guard.engine.conftest import REQUEST, Script
from tests.guard.engine.test_live_engine import check_corrected, check_replay, trigger_of
from tests.guard.lora import build_detour

CHUNK = 32
LONG = REQUEST + " Please answer at length." * 8


@pytest.fixture(scope="session")
def second(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine that takes LoRA adapters and at most 32 tokens a step, without a prefix cache.

    It lives as long as the shared engine: one that is collected takes the process's distributed state along.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    from guard.engine.adapter import engine_arguments

    spool = tmp_path_factory.mktemp("second-spool")
    # vLLM's kernels for adapters on GPUs take half precision alone.
    dtype = "float32" if current_platform.is_cpu() else "bfloat16"
    llm = LLM(
        str(tiny_model), dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4, block_size=32,
        enable_prefix_caching=False, num_gpu_blocks_override=64, disable_log_stats=True, enable_lora=True, max_loras=1,
        max_lora_rank=8, max_num_batched_tokens=CHUNK, async_scheduling=False,
        **engine_arguments({"spool": str(spool), "allow_off": True}),
    )  # fmt: skip
    return Engine(llm, spool)


def test_a_prompt_prefilled_in_chunks_changes_nothing(engine: Engine, second: Engine, script: Script) -> None:
    prompt, params = second.prompt(LONG), second.sampling()
    inner = second.llm.llm_engine
    inner.add_request("long", {"prompt_token_ids": prompt}, params)
    steps, outputs = 0, []
    while inner.has_unfinished_requests():
        outputs += inner.step()
        steps += not outputs
    assert steps + 1 == -(-len(prompt) // CHUNK) > 2, "steps that end without a token"
    trace = second.traces()[params.extra_args["guard_id"]]
    reply = Reply(list(outputs[-1].outputs[0].token_ids), outputs[-1].outputs[0].finish_reason, trace)
    check_corrected(second, script, reply)
    (whole,) = engine.run([(LONG, {})])
    assert whole.trace is not None
    assert (reply.ids, trace.steps) == (whole.ids, whole.trace.steps)
    assert trace.receipt.interventions == whole.trace.receipt.interventions


def test_a_long_prompt_among_running_rows_changes_nothing(second: Engine, script: Script) -> None:
    replies = second.run([(REQUEST, {}), (LONG, {}), (REQUEST, {"extra_args": {"guard_off": True}}), (LONG, {})])
    for index in (0, 1, 3):
        check_corrected(second, script, replies[index])
    assert replies[2] == Reply(script.comply, "stop", None)


def test_what_an_adapter_says_is_corrected(second: Engine, script: Script, tiny_model: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("detour", 1, str(build_detour(tiny_model, tmp_path / "detour")))
    sampling = [second.sampling(**row) for row in ({}, {"extra_args": {"guard_off": True}})]
    prompts = [{"prompt_token_ids": second.prompt(REQUEST)}] * 2
    # No row without an adapter beside them: on CPUs vLLM 0.32 gives it theirs (lora_ops.py indexes slot -1).
    outputs = second.llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    guarded, free = (list(output.outputs[0].token_ids) for output in outputs)
    agrees = [*script.cue, *script.plan]
    assert free == [*script.opening, *script.plan, *agrees * 9][:80]
    trace = second.traces()[sampling[0].extra_args["guard_id"]]
    (item,) = trace.receipt.interventions
    trigger = trigger_of(second, item.trigger_id)
    assert item.at == script.at + len(script.plan)
    assert guarded == [*script.opening, *script.plan, *script.cue, *trigger.spaced, *script.refusal]
    assert (trace.output_ids, trace.receipt.clean) == (guarded, True)
    check_replay(second, trace)
    check_corrected(second, script, second.run([(REQUEST, {})])[0])
