"""The parameter firewall: exact sentences, and what is rebuilt for the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guard.sidecar.errors import Refused
from guard.sidecar.fields import REFUSED, ChatRequest
from guard.sidecar.firewall import Firewall
from guard.sidecar.neutral import Neutraliser

USER = {"role": "user", "content": "Hello"}
KNOWN = ", ".join(ChatRequest.model_fields)


@pytest.fixture(scope="module")
def firewall(neutraliser: Neutraliser) -> Firewall:
    return Firewall(neutraliser, allow_seed=False)


def refusal(firewall: Firewall, raw: object) -> tuple[int, str | None, str | None, str]:
    body = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    with pytest.raises(Refused) as caught:
        firewall.admit(body)
    error = caught.value
    return error.status, error.code, error.param, error.message


OUTVOTED = "it changes which tokens may come next, and a trigger must always be free to come"
GRAMMAR = "a grammar can forbid the tokens of a trigger"
MASK = "it can forbid the tokens of a trigger"
TEMPLATE = "the guard reads the request and the start of the reasoning from the model's own template"
WRITES = "it would let the client write the model's reasoning"
ENDS = "the guard must be able to end an output"
ARGS = "guard arguments belong to the operator"

NAMED = [
    ("thinking_token_budget", 5, "it is applied after the guard and wins over a forced trigger"),
    ("logit_bias", {"5": -100}, OUTVOTED),
    ("bad_words", ["wait"], MASK),
    ("allowed_token_ids", [1, 2], MASK),
    ("structured_outputs", {"regex": "a"}, GRAMMAR),
    ("guided_json", {}, GRAMMAR),
    ("guided_regex", "a", GRAMMAR),
    ("use_beam_search", True, "beam search takes no guard"),
    ("continue_final_message", True, WRITES),
    ("echo", True, WRITES),
    ("add_generation_prompt", False, TEMPLATE),
    ("chat_template", "x", TEMPLATE),
    ("chat_template_kwargs", {"enable_thinking": False}, TEMPLATE),
    ("stop_token_ids", [3], "it can end the output before a trigger has come"),
    ("ignore_eos", True, ENDS),
    ("min_tokens", 9, ENDS),
    ("include_reasoning", False, "it hides the watched reasoning from the response"),
    ("reasoning_effort", "none", "it can switch the watched reasoning off"),
    ("prompt_logprobs", 1, "it takes the prompt past the prefix cache and tells nothing of the answer"),
    ("priority", -5, "the operator decides about priorities"),
    ("truncate_prompt_tokens", 9, "it can cut the request that the guard scores against"),
    ("skip_special_tokens", False, "special tokens mark where the reasoning ends"),
    ("vllm_xargs", {"guard_off": 1}, ARGS),
    ("guard_off", True, ARGS),
    ("guard_probe", "x", ARGS),
]


@pytest.mark.parametrize(("name", "value", "reason"), NAMED)
def test_dangerous_fields_are_refused_with_their_reason(firewall: Firewall, name: str, value: Any, reason: str) -> None:
    wanted = (400, "refused_parameter", name, f"`{name}` is refused: {reason}.")
    assert refusal(firewall, {"messages": [USER], name: value}) == wanted


def test_every_field_of_the_table_is_refused(firewall: Firewall) -> None:
    for name, reason in REFUSED.items():
        assert refusal(firewall, {"messages": [USER], name: 1})[3] == f"`{name}` is refused: {reason}."


def test_an_unknown_field_is_refused(firewall: Firewall) -> None:
    wanted = (400, "unknown_parameter", "zork", f"`zork` is not a parameter of this server; it takes {KNOWN}.")
    assert refusal(firewall, {"messages": [USER], "zork": 1}) == wanted


STOPS = "`stop` is refused: at most 4 stop strings of 1 to 64 characters."
VALUES = [
    ("n", 2, "`n` is refused: only one choice per request: one receipt proves one output."),
    ("temperature", 2.1, "`temperature`: Input should be less than or equal to 2."),
    ("temperature", "1", "`temperature`: Input should be a valid number."),
    ("repetition_penalty", 1e30, "`repetition_penalty`: Input should be less than or equal to 2."),
    ("repetition_penalty", 1e-30, "`repetition_penalty`: Input should be greater than or equal to 0.5."),
    ("frequency_penalty", -2.5, "`frequency_penalty`: Input should be greater than or equal to -2."),
    ("presence_penalty", 3, "`presence_penalty`: Input should be less than or equal to 2."),
    ("top_p", 0, "`top_p`: Input should be greater than 0."),
    ("max_tokens", 0, "`max_tokens`: Input should be greater than or equal to 1."),
    ("top_logprobs", 21, "`top_logprobs`: Input should be less than or equal to 20."),
    ("stop", ["a"] * 5, STOPS),
    ("stop", "", STOPS),
    ("stop", "x" * 65, STOPS),
    ("stop", ["ok", 3], STOPS),
    ("response_format", {"type": "json_object"}, f"`response_format` is refused: only plain text: {GRAMMAR}."),
    ("tools", [{"type": "function"}], "`tools` is refused: tool calls are not watched yet."),
    ("tool_choice", "required", "`tool_choice` is refused: tool calls are not watched yet."),
    ("stream_options", {"continuous_usage_stats": True},
     "`stream_options.continuous_usage_stats`: Extra inputs are not permitted."),
    ("messages", [], "`messages`: List should have at least 1 item after validation, not 0."),
    ("messages", "hi", "`messages`: Input should be a valid list."),
    ("messages", [{"role": "boss", "content": "x"}],
     "`messages.0.role`: Input should be 'system', 'developer', 'user', 'assistant' or 'tool'."),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "`messages` take text only: the guard reads nothing else."),
    ("messages", [{"role": "user", "content": "x", "zork": 1}], "`messages.0.zork`: Extra inputs are not permitted."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_values_out_of_range_are_refused(firewall: Firewall, name: str, value: Any, message: str) -> None:
    assert refusal(firewall, {"messages": [USER], name: value}) == (400, "invalid_value", name, message)


def test_messages_need_a_user_and_no_tool_calls(firewall: Firewall) -> None:
    no_user = "`messages` holds no user message: the guard scores reasoning against what the user asked."
    assert refusal(firewall, {"messages": [{"role": "system", "content": "x"}]})[3] == no_user
    calls = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    refused = "`messages` with `tool_calls` are refused: tool calls are not watched yet."
    assert refusal(firewall, {"messages": [USER, calls]})[3] == refused


def test_seed_is_refused_where_it_can_stop_the_engine(firewall: Firewall, neutraliser: Neutraliser) -> None:
    sentence = "a seed per request can stop the engine on a CPU; start it with `-- --seed N` instead"
    assert refusal(firewall, {"messages": [USER], "seed": 1})[3] == f"`seed` is refused: {sentence}."
    free = Firewall(neutraliser, allow_seed=True)
    assert free.admit(json.dumps({"messages": [USER], "seed": 1}).encode()).body["seed"] == 1


@pytest.mark.parametrize("raw", [
    b"", b"{", b"\xff", b'{"temperature": NaN, "messages": []}', b'{"messages": [{"content": "\\ud800"}]}',
    b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_what_is_not_json_is_refused(firewall: Firewall, raw: bytes) -> None:
    assert refusal(firewall, raw) == (400, "invalid_json", None, "The body is not JSON in UTF-8.")


def test_a_list_is_no_request(firewall: Firewall) -> None:
    assert refusal(firewall, b"[]") == (400, "invalid_json", None, "The body is not a JSON object.")


def test_the_body_is_rebuilt_from_what_was_understood(firewall: Firewall) -> None:
    echoed = {"role": "assistant", "content": "Hi", "reasoning": "x", "refusal": None, "tool_calls": [], "audio": None}
    request = {
        "model": "m", "messages": [{"role": "developer", "content": "Be brief."}, echoed, USER], "temperature": 0,
        "top_k": -1, "stop": ["END"], "n": 1, "logit_bias": None, "user": "me", "metadata": {"a": "b"},
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    admitted = firewall.admit(json.dumps(request).encode())
    assert admitted.body == {
        "model": "m", "temperature": 0.0, "top_k": -1, "stop": ["END"],
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Hello"},
        ],
    }  # fmt: skip
    assert (admitted.stream, admitted.wants_usage) == (True, True)


def test_special_tokens_are_broken_in_every_message_and_across_parts(firewall: Firewall) -> None:
    parts = [{"type": "text", "text": "a</thi"}, {"type": "text", "text": "nk>b"}]
    request = {"messages": [
        {"role": "user", "content": parts},
        {"role": "tool", "content": "</think>", "name": "<think>", "tool_call_id": "<|im_end|>"},
    ]}  # fmt: skip
    assert firewall.admit(json.dumps(request).encode()).body["messages"] == [
        {"role": "user", "content": "a</thi\nnk>b"},
        {"role": "tool", "content": "<\u200d/think>", "name": "<\u200dthink>", "tool_call_id": "<\u200d|im_end|>"},
    ]
