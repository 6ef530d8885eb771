"""Every engine feature of docs/engines.md that a request can ask for, on the real engine: enforced, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.conftest import Engine
from tests.guard.engine.conftest import EOS, REQUEST, Script
from tests.guard.engine.test_v1_engine import check_corrected, trigger_of

#: Name -> parameters under which a cue is answered exactly as without them.
ENFORCED: dict[str, dict[str, Any]] = {
    "top-p and min-p": {"temperature": 0.01, "top_p": 0.5, "min_p": 0.2, "seed": 3},
    "top-k": {"temperature": 0.01, "top_k": 2, "seed": 3},
    "penalties": {"frequency_penalty": 0.01, "presence_penalty": 0.01, "repetition_penalty": 1.01},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "min_tokens": {"min_tokens": 20},
    "stop tokens elsewhere": {"stop_token_ids": [0]},
    "stop strings elsewhere": {"stop": ["never said"], "include_stop_str_in_output": True},
    "no detokenisation": {"detokenize": False},
}


@pytest.mark.parametrize("name", ENFORCED)
def test_sampling_parameters_change_nothing(engine: Engine, script: Script, name: str) -> None:
    (reply,) = engine.run([(REQUEST, ENFORCED[name])])
    check_corrected(engine, script, reply)


def test_a_bias_against_a_triggers_tokens_is_outvoted(engine: Engine, script: Script) -> None:
    (plain,) = engine.run([(REQUEST, {})])
    trigger = check_corrected(engine, script, plain)
    bias = {token: -100.0 for token in trigger.spaced if token not in script.corrected(())}
    assert bias
    (reply,) = engine.run([(REQUEST, {"logit_bias": bias})])
    assert reply.ids == plain.ids


def test_a_forced_token_shows_the_models_own_logprob(engine: Engine, script: Script) -> None:
    params = engine.sampling(logprobs=0)
    (output,) = engine.llm.generate([{"prompt_token_ids": engine.prompt(REQUEST)}], params, use_tqdm=False)
    (child,) = output.outputs
    said = [row[token].logprob for row, token in zip(child.logprobs, child.token_ids, strict=True)]
    ranks = [row[token].rank for row, token in zip(child.logprobs, child.token_ids, strict=True)]
    assert ranks[script.at] > 1
    assert said[script.at] < max(said)


def test_a_prefix_from_the_cache_changes_nothing(engine: Engine, script: Script) -> None:
    request = REQUEST + " Please answer at some length, step by step, and leave nothing out of what you know about it."
    first, second = (engine.run([(request, {})])[0] for _ in range(2))
    assert first.ids == second.ids
    check_corrected(engine, script, second)


def test_a_stop_string_inside_a_trigger_ends_the_request_there(engine: Engine, script: Script) -> None:
    (whole,) = engine.run([(REQUEST, {})])
    assert whole.trace is not None
    trigger = trigger_of(engine, whole.trace.receipt.interventions[0].trigger_id)
    word = trigger.text.split()[2]
    (cut,) = engine.run([(REQUEST, {"stop": [" " + word]})])
    assert cut.trace is not None
    (item,) = cut.trace.receipt.interventions
    assert (item.completed, item.forced) == (False, 3)
    assert cut.trace.output_ids == whole.ids[: script.at + 3]
    assert cut.trace.receipt.clean


def test_a_grammar_that_forbids_the_trigger_is_left_alone(engine: Engine, script: Script) -> None:
    table = engine.processor._guard._runtime.table
    only = table.text([*script.opening, *script.cue, *script.plan])
    (reply,) = engine.run([(REQUEST, {"structured_outputs": StructuredOutputsParams(choice=[only])})])
    assert reply.ids == [*script.opening, *script.cue, *script.plan, EOS]
    assert reply.trace is not None
    receipt = reply.trace.receipt
    assert (receipt.enforcement_failed, receipt.clean) == (1, False)
    assert receipt.errors == ["a grammar or mask forbids the next trigger token"]
    assert [(i.forced, i.completed, i.at) for i in receipt.interventions] == [(0, False, script.at)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bad_words", {"bad_words": ["Wait"]}),
        ("allowed_token_ids", {"allowed_token_ids": [5, 6]}),
        ("thinking_token_budget", {"thinking_token_budget": 8}),
    ],
)
def test_what_could_take_a_forced_token_away_is_refused(
    engine: Engine, script: Script, name: str, params: dict[str, Any]
) -> None:
    with pytest.raises((VLLMValidationError, ValueError), match=name):
        engine.llm.generate([{"prompt_token_ids": engine.prompt(REQUEST)}], SamplingParams(**params), use_tqdm=False)
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


def test_a_model_that_does_not_think_is_left_alone_by_default(engine: Engine, script: Script) -> None:
    # The prompt closes the block: what follows is an answer, which the default policy does not watch.
    closed = [*engine.prompt(REQUEST), 4]
    params = engine.sampling(max_tokens=12)
    engine.llm.generate([{"prompt_token_ids": closed}], params, use_tqdm=False)
    trace = engine.traces()[params.extra_args["guard_id"]]
    assert (trace.steps, trace.receipt.seen) == ([], 0)


def test_an_assistant_prefix_is_continued_under_guard(engine: Engine, script: Script) -> None:
    # `continue_final_message`: the prefix is prompt, so it is not scored; what the model adds to it is.
    prefix = [*engine.prompt(REQUEST), *script.opening]
    params = engine.sampling()
    (output,) = engine.llm.generate([{"prompt_token_ids": prefix}], params, use_tqdm=False)
    trace = engine.traces()[params.extra_args["guard_id"]]
    (item,) = trace.receipt.interventions
    trigger = trigger_of(engine, item.trigger_id)
    assert list(output.outputs[0].token_ids) == [*script.cue, *trigger.spaced, *script.refusal]
