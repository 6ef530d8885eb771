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
    """Name of a test in `tests/guard`; empty where none exists."""


_ON: Verdict = "enforced"
_START: Verdict = "refused at start"
_REQUEST: Verdict = "refused per request"
_OFF: Verdict = "not enforced"

FEATURES: tuple[Feature, ...] = (
    Feature("greedy and sampled (temperature, top-p, top-k, min-p, seed)", _ON, _ON, "the forced logit is 1e9",
            "test_sampling_parameters_change_nothing"),
    Feature("frequency, presence, repetition penalties", _ON, _ON, "they act before the guard",
            "test_sampling_parameters_change_nothing"),
    Feature("logit_bias", _ON, _REQUEST, "it acts before the guard",
            "test_a_bias_against_a_triggers_tokens_is_outvoted"),
    Feature("bad_words, allowed_token_ids", _REQUEST, _REQUEST, "they could forbid a trigger's tokens",
            "test_what_could_take_a_forced_token_away_is_refused"),
    Feature("thinking_token_budget", _REQUEST, _REQUEST, "it acts after the guard and wins",
            "test_what_could_take_a_forced_token_away_is_refused"),
    Feature("min_tokens", _ON, _REQUEST, "the guard's own end of a request wins over it",
            "test_sampling_parameters_change_nothing"),
    Feature("logprobs", _ON, _ON, "a forced token shows the model's own value",
            "test_a_forced_token_shows_the_models_own_logprob"),
    Feature("stop strings", _ON, _ON, "one inside a trigger ends the request there; the receipt says so",
            "test_a_stop_string_inside_a_trigger_ends_the_request_there"),
    Feature("max_tokens inside a trigger", _ON, _ON, "the trigger is cut; nothing leaks to the next request",
            "test_max_tokens_inside_a_trigger_leaks_nothing"),
    Feature("n > 1", _ON, _REQUEST, "every child is corrected; they share one guard id, so one trace",
            "test_children_of_one_request_are_all_corrected"),
    Feature("batches that grow, shrink, swap", _ON, _ON, "", "test_sixteen_mixed_rows"),
    Feature("prefix caching, chunked prefill", _ON, _ON, "", "test_a_prefix_from_the_cache_changes_nothing"),
    Feature("preemption and resumption", _ON, _ON, "state is rebuilt from tokens",
            "test_rows_preempted_again_and_again_are_corrected"),
    Feature("structured outputs", _OFF, _REQUEST, "what the grammar forbids is not forced; the receipt says so",
            "test_a_grammar_that_forbids_the_trigger_is_left_alone"),
    Feature("tool calls", _OFF, _REQUEST, "their arguments are an answer that no policy reads",
            "test_messages_need_a_user_and_no_tool_calls"),
    Feature("beam search", _OFF, _REQUEST, "vLLM runs it as many one-token requests",
            "test_dangerous_fields_are_refused_with_their_reason"),
    Feature("continue_final_message", _ON, _REQUEST, "the prefix is prompt and not scored; what follows is",
            "test_an_assistant_prefix_is_continued_under_guard"),
    Feature("LoRA requests", _ON, _REQUEST, "the guard reads tokens, whoever made them; not tested", ""),
    Feature("speculative decoding", _START, _START, "a cue may end inside accepted drafts",
            "test_speculative_decoding_refuses_to_start"),
    Feature("asynchronous scheduling", _START, _START, "runner V1 shows placeholders when a request ends",
            "test_a_placeholder_breaks_the_guard_and_closed_ends_the_request"),
    Feature("pipeline parallelism, batch-sharded sampling", _START, _START, "a rank would see part of the batch",
            "test_what_the_guard_cannot_enforce_under_is_refused_with_the_reason"),
    Feature("tensor parallelism", _ON, _ON, "every rank decides the same; the first one writes",
            "test_two_ranks_decide_what_one_decides"),
    Feature("templates that open the reasoning, and templates that do not", _ON, _ON, "zones follow generated ids",
            "test_generation_that_starts_in_the_answer_is_unwatched_until_reasoning_opens"),
    Feature("a reply that never thinks", _ON, _ON, "the answer is watched where the policy's zones say so",
            "test_a_model_that_does_not_think_is_left_alone_by_default"),
    Feature("models that mark no reasoning", _START, _START, "unless the policy watches answers",
            "test_a_model_that_marks_no_reasoning_needs_the_answer_zone"),
    Feature("channels of several tokens (Harmony)", _START, _START, "their delimiters are no single ids", ""),
)  # fmt: skip


def markdown() -> str:
    """The table of docs/engines.md."""
    lines = ["| feature | in the engine | through `serve` | note | test |", "|---|---|---|---|---|"]
    for row in FEATURES:
        test = f"`{row.test}`" if row.test else "none yet"
        lines.append(f"| {row.name} | {row.engine} | {row.sidecar} | {row.note} | {test} |")
    return "\n".join(lines) + "\n"
