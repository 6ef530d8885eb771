"""Every engine feature of docs/engines.md that a request can ask for, on the real engine: enforced, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from guard.policy import Policy
from tests import tiny
from tests.conftest import Engine, Reply
from tests.guard.engine.conftest import EOS, REQUEST, Script, Swap
from tests.guard.engine.test_live_engine import check_corrected, check_replay, stepped, trigger_of

PAD, THINK, THINK_END = 0, 3, 4

#: Name -> parameters under which a cue is answered exactly as without them.
ENFORCED: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
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


#: Parameters of rows that are sampled at temperature 1: where a sampler could lose a forced token, one of them would.
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {}, "top-p": {"top_p": 0.5}, "top-k": {"top_k": 2}, "min-p": {"min_p": 0.2},
    "hot": {"temperature": 2.0}, "seeded": {"seed": 3}, "frequency": {"frequency_penalty": 2.0},
    "presence": {"presence_penalty": 2.0}, "repetition": {"repetition_penalty": 2.0},
    "most repetition": {"repetition_penalty": 1e30}, "least repetition": {"repetition_penalty": 1e-30},
    "all": {"frequency_penalty": -2.0, "presence_penalty": -2.0, "repetition_penalty": 0.5, "top_p": 0.1},
}  # fmt: skip


def test_sampled_and_penalised_rows_are_forced_as_well(engine: Engine, swap: Swap) -> None:
    # The tiny model babbles at temperature 1; a threshold of 0 makes every step a cue.
    policy = Policy(threshold=0.0, max_step_tokens=8, ladder=("trigger",) * 3, zones=("reasoning", "answer"))
    with swap(policy=policy):
        replies = engine.run([(REQUEST, {"temperature": 1.0, "max_tokens": 150, **row}) for row in SAMPLED.values()])
        for name, reply in zip(SAMPLED, replies, strict=True):
            assert reply.trace is not None
            assert reply.trace.output_ids == reply.ids
            receipt = reply.trace.receipt
            assert receipt.enforcement_failed == 0, name
            assert receipt.interventions, name
            for item in receipt.interventions:
                trigger = trigger_of(engine, item.trigger_id)
                got = tuple(reply.ids[item.at : item.at + item.forced])
                assert any(got == ids[: item.forced] for ids in (trigger.spaced, trigger.plain, trigger.opening))
            # Babble may end by chance before the third.
            assert receipt.interventions[0].completed, name
            check_replay(engine, reply.trace)


def test_a_prefix_from_the_cache_changes_nothing(engine: Engine, script: Script) -> None:
    request = REQUEST + " Please answer at some length, step by step, and leave nothing out of what you know about it."
    replies, cached = [], []
    for _ in range(2):
        params = engine.sampling()
        (output,) = engine.llm.generate([{"prompt_token_ids": engine.prompt(request)}], params, use_tqdm=False)
        trace = engine.traces()[params.extra_args["guard_id"]]
        replies.append(Reply(list(output.outputs[0].token_ids), output.outputs[0].finish_reason, trace))
        cached.append(output.num_cached_tokens)
    assert cached[0] < 32 <= cached[1], "blocks of 32"
    assert replies[0].ids == replies[1].ids
    check_corrected(engine, script, replies[1])


def test_a_stop_string_inside_a_trigger_ends_the_request_there(engine: Engine, script: Script) -> None:
    (whole,) = engine.run([(REQUEST, {})])
    assert whole.trace is not None
    trigger = trigger_of(engine, whole.trace.receipt.interventions[0].trigger_id)
    # The first word of the trigger, after its very first, that was not said before.
    words = trigger.text.split()
    said = [" ".join([tiny.OPENING, tiny.CUE, *words[:count]]) for count in range(len(words))]
    forced = next(n + 1 for n, word in enumerate(words) if n and f" {word}" not in said[n])
    (cut,) = engine.run([(REQUEST, {"stop": [f" {words[forced - 1]}"]})])
    assert cut.trace is not None
    (item,) = cut.trace.receipt.interventions
    assert (item.completed, item.forced) == (False, forced)
    assert cut.trace.output_ids == whole.ids[: script.at + forced]
    assert cut.trace.receipt.clean


def test_a_grammar_that_forbids_the_trigger_is_left_alone(engine: Engine, script: Script) -> None:
    table = engine.guard._runtime.table
    only = table.text([*script.opening, *script.cue, *script.plan])
    (reply,) = engine.run([(REQUEST, {"structured_outputs": StructuredOutputsParams(choice=[only])})])
    assert reply.ids == [*script.opening, *script.cue, *script.plan, EOS]
    assert reply.trace is not None
    receipt = reply.trace.receipt
    assert (receipt.enforcement_failed, receipt.clean) == (1, False)
    (item,) = receipt.interventions
    wanted = trigger_of(engine, item.trigger_id).spaced[0]
    # V1 sees the mask in the row; V2 sees one step later that another token came.
    seen = {
        "vllm-v1": "a grammar or mask forbids the next trigger token",
        "vllm-v2": f"engine appended {script.plan[0]} where {wanted} was forced",
    }
    assert receipt.errors == [seen[engine.guard._engine]]
    assert [(i.forced, i.completed, i.at) for i in receipt.interventions] == [(0, False, script.at)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bad_words", {"bad_words": ["Wait"]}),
        ("allowed_token_ids", {"allowed_token_ids": [5, 6]}),
        ("thinking_token_budget", {"thinking_token_budget": 8}),
        ("min_tokens", {"min_tokens": 1}),
    ],
)
def test_what_could_take_a_forced_token_away_is_refused(
    engine: Engine, script: Script, name: str, params: dict[str, Any]
) -> None:
    with pytest.raises((VLLMValidationError, ValueError), match=name):
        engine.llm.generate([{"prompt_token_ids": engine.prompt(REQUEST)}], SamplingParams(**params), use_tqdm=False)
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


def test_beam_search_is_refused(engine: Engine, script: Script) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=8)
    with pytest.raises(VLLMValidationError, match="beam search cannot be used under the guard: it asks token by token"):
        engine.llm.beam_search([{"prompt_token_ids": engine.prompt(REQUEST)}], params)
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])
    # One token with its alternatives is no search.
    assert engine.run([(REQUEST, {"max_tokens": 1, "logprobs": 4})])[0].ids == script.opening[:1]


def test_an_end_that_is_ignored_is_not_obeyed(engine: Engine, script: Script, swap: Swap) -> None:
    with swap(policy=Policy(ladder=("stop",))):
        obeyed, ignored = engine.run([(REQUEST, {}), (REQUEST, {"ignore_eos": True, "max_tokens": script.at + 3})])
    assert (obeyed.ids, obeyed.finish) == ([*script.comply[: script.at], EOS], "stop")
    assert (ignored.ids[: script.at + 1], ignored.finish) == (obeyed.ids, "length")


def replied(engine: Engine, prompt: list[int], **params: Any) -> Reply:
    """The reply to a prompt in ids."""
    sampling = engine.sampling(**params)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    (child,) = output.outputs
    return Reply(list(child.token_ids), child.finish_reason, engine.traces()[sampling.extra_args["guard_id"]])


def test_a_reply_that_never_thinks_is_watched_where_the_policy_says_so(
    engine: Engine, script: Script, swap: Swap
) -> None:
    # The prompt closes the reasoning, so all that follows is an answer.
    prompt = [*engine.prompt(REQUEST), THINK_END, *script.opening]
    left = replied(engine, prompt, max_tokens=len(script.cue) + 2)
    assert left.ids == [*script.cue, *script.plan[:2]]
    assert left.trace is not None
    assert (left.trace.steps, left.trace.receipt.seen) == ([], 0)
    with swap(policy=Policy(zones=("reasoning", "answer"))):
        watched = replied(engine, prompt)
        assert watched.trace is not None
        trigger = trigger_of(engine, watched.trace.receipt.interventions[0].trigger_id)
    assert watched.ids == [*script.cue, *trigger.spaced, *script.refusal]
    assert watched.trace.steps[0].zone == "answer"


def test_reasoning_that_the_model_opens_itself_is_watched(engine: Engine, script: Script) -> None:
    opened = engine.prompt(REQUEST)
    think = opened.index(THINK)
    # A template that does not open the reasoning: the tiny model does so after this id.
    reply = replied(engine, [*opened[:think], PAD])
    assert reply.trace is not None
    (item,) = reply.trace.receipt.interventions
    trigger = trigger_of(engine, item.trigger_id)
    assert reply.ids == [THINK, *opened[think + 1 :], *script.corrected(trigger.spaced)]
    assert {step.zone for step in reply.trace.steps} == {"reasoning"}
    assert item.at == len(opened) - think + script.at


def test_rows_that_join_and_leave_a_running_batch_are_corrected(engine: Engine, script: Script) -> None:
    # One joins every third step; every second one ends before its cue does, and a later one takes its place.
    short = script.at - 2
    rows = [engine.sampling(**({"max_tokens": short} if i % 2 else {})) for i in range(12)]

    def join(step: int) -> None:
        if step % 3 == 0 and 0 < step // 3 < len(rows):
            prompt = {"prompt_token_ids": engine.prompt(REQUEST)}
            engine.llm.llm_engine.add_request(f"joins-{step}", prompt, rows[step // 3])

    stepped(engine, {"first": (REQUEST, rows[0])}, join)
    traces = engine.traces()
    for i, params in enumerate(rows):
        trace = traces[params.extra_args["guard_id"]]
        if i % 2:
            assert trace.output_ids == script.comply[:short]
            assert trace.receipt.clean
        else:
            check_corrected(engine, script, Reply(trace.output_ids, "stop", trace))


@pytest.mark.parametrize("said", [0, 4, 8])
def test_an_assistant_prefix_is_continued_under_guard(engine: Engine, script: Script, said: int) -> None:
    # The prefix is prompt, so it is not scored; what the model adds to it is.
    prefix = engine.llm.get_tokenizer().decode([THINK, *engine.prompt(REQUEST)[-1:], *script.opening[:said]])
    messages = [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": prefix}]
    params = engine.sampling()
    (output,) = engine.llm.chat(
        messages, params, add_generation_prompt=False, continue_final_message=True, use_tqdm=False
    )
    trace = engine.traces()[params.extra_args["guard_id"]]
    assert trace.prompt_ids == [*engine.prompt(REQUEST), *script.opening[:said]]
    assert trace.request == REQUEST
    (item,) = trace.receipt.interventions
    assert item.at == script.at - said
    assert list(output.outputs[0].token_ids) == script.corrected(trigger_of(engine, item.trigger_id).spaced)[said:]
