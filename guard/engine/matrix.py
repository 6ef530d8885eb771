"""What the guard does about every feature of the engine: one table for `doctor`, docs/engines.md and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["enforced", "refused at start", "refused per request", "not enforced"]


@dataclass(frozen=True)
class Feature:
    """One row: what happens in the engine, what the sidecar does before it, and the test that shows it."""

    name: str
    engine: Verdict
    sidecar: Verdict
    note: str
    test: str
    """Name of the test in `tests/guard` that shows it."""


_ON: Verdict = "enforced"
_START: Verdict = "refused at start"
_REQUEST: Verdict = "refused per request"
_OFF: Verdict = "not enforced"

FEATURES: tuple[Feature, ...] = (
    Feature("greedy and sampled (temperature, top-p, top-k, min-p, seed)", _ON, _ON, "all other logits are -inf",
            "test_sampled_and_penalised_rows_are_forced_as_well"),
    Feature("frequency, presence, repetition penalties", _ON, _ON,
            "runner V1 applies them after the guard, to which -inf is immune",
            "test_sampled_and_penalised_rows_are_forced_as_well"),
    Feature("logit_bias", _ON, _REQUEST, "it acts before the guard",
            "test_a_bias_against_a_triggers_tokens_is_outvoted"),
    Feature("bad_words, allowed_token_ids", _REQUEST, _REQUEST, "they could forbid a trigger's tokens",
            "test_what_could_take_a_forced_token_away_is_refused"),
    Feature("thinking_token_budget", _REQUEST, _REQUEST, "it acts after the guard and wins",
            "test_what_could_take_a_forced_token_away_is_refused"),
    Feature("min_tokens", _REQUEST, _REQUEST, "it forbids the token that ends a request",
            "test_what_could_take_a_forced_token_away_is_refused"),
    Feature("ignore_eos", _OFF, _REQUEST, "triggers are forced; where the guard ends a request, vLLM goes on",
            "test_an_end_that_is_ignored_is_not_obeyed"),
    Feature("logprobs", _ON, _ON, "a forced token shows the model's own value",
            "test_a_forced_token_shows_the_models_own_logprob"),
    Feature("stop strings", _ON, _ON, "one inside a trigger ends the request there; the receipt says so",
            "test_a_stop_string_inside_a_trigger_ends_the_request_there"),
    Feature("max_tokens inside a trigger", _ON, _ON, "the trigger is cut; nothing leaks to the next request",
            "test_max_tokens_inside_a_trigger_leaks_nothing"),
    Feature("n > 1", _ON, _REQUEST, "every child is corrected; they share one guard id, so one trace",
            "test_children_of_one_request_are_all_corrected"),
    Feature("batches that grow, shrink, swap", _ON, _ON, "",
            "test_rows_that_join_and_leave_a_running_batch_are_corrected"),
    Feature("prefix caching", _ON, _ON, "", "test_a_prefix_from_the_cache_changes_nothing"),
    Feature("chunked prefill", _ON, _ON, "", "test_a_prompt_prefilled_in_chunks_changes_nothing"),
    Feature("preemption and resumption", _ON, _ON, "state is rebuilt from tokens",
            "test_rows_preempted_again_and_again_are_corrected"),
    Feature("structured outputs", _OFF, _REQUEST, "what the grammar forbids is not forced; the receipt says so",
            "test_a_grammar_that_forbids_the_trigger_is_left_alone"),
    Feature("tool calls", _OFF, _REQUEST, "their arguments are an answer that no policy reads",
            "test_messages_need_a_user_and_no_tool_calls"),
    Feature("beam search", _REQUEST, _REQUEST,
            "vLLM asks token by token, with the text so far as the prompt: no step is ever seen",
            "test_beam_search_is_refused"),
    Feature("continue_final_message", _ON, _REQUEST, "the prefix is prompt and not scored; what follows is",
            "test_an_assistant_prefix_is_continued_under_guard"),
    Feature("LoRA requests", _ON, _ON,
            "the guard reads tokens, whoever made them; on CPUs vLLM 0.32 lends an adapter to the rows beside it",
            "test_what_an_adapter_says_is_corrected"),
    Feature("weights exchanged while requests run", _ON, _ON, "state is rebuilt from tokens; the receipt says so",
            "test_a_request_in_flight_is_carried_over_and_says_so"),
    Feature("speculative decoding", _START, _START, "a cue may end inside accepted drafts",
            "test_speculative_decoding_refuses_to_start"),
    Feature("asynchronous scheduling", _ON, _START,
            "runner V1 hides the last token of a reply that ends by length, and serve proves whole replies",
            "test_asynchronous_scheduling_decides_the_same"),
    Feature("pipeline parallelism, batch-sharded sampling", _START, _START, "a rank would see part of the batch",
            "test_what_the_guard_cannot_enforce_under_is_refused_with_the_reason"),
    Feature("tensor parallelism", _ON, _ON, "every rank decides the same; the first one writes",
            "test_two_ranks_decide_what_one_decides"),
    Feature("templates that open the reasoning, and templates that do not", _ON, _ON, "zones follow generated ids",
            "test_reasoning_that_the_model_opens_itself_is_watched"),
    Feature("a reply that never thinks", _ON, _ON, "the answer is watched where the policy's zones say so",
            "test_a_reply_that_never_thinks_is_watched_where_the_policy_says_so"),
    Feature("models that mark no reasoning", _START, _START, "unless the policy watches answers",
            "test_a_model_that_marks_no_reasoning_needs_the_answer_zone"),
    Feature("channels (Harmony) in a model of type gpt_oss", _ON, _ON, "all but the final channel is reasoning",
            "test_unary_is_refused_in_the_final_channel"),
    Feature("channels in a model of another type", _ON, _START, "vLLM would not take its replies apart",
            "test_channels_that_vllm_would_not_take_apart_are_refused"),
)  # fmt: skip


def markdown() -> str:
    """The table of docs/engines.md."""
    lines = ["| feature | in the engine | through `serve` | note | test |", "|---|---|---|---|---|"]
    for row in FEATURES:
        lines.append(f"| {row.name} | {row.engine} | {row.sidecar} | {row.note} | `{row.test}` |")
    return "\n".join(lines) + "\n"
