"""What `/v1/responses` takes, what it becomes, what is refused; and that no field of vLLM's models goes unjudged."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from guard.sidecar.completions import COMPLETIONS_REFUSED, CompletionRequest
from guard.sidecar.errors import Refused
from guard.sidecar.fields import DROPPED, REFUSED, REFUSED_PREFIXES, ChatRequest
from guard.sidecar.firewall import Firewall
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.responses_fields import RESPONSES_DROPPED, RESPONSES_REFUSED, ResponsesRequest

STORED = "no response is stored here; send the whole conversation in `input`"
READS = "it takes text and messages of text: the guard reads nothing else, and tool calls are not watched yet"
TOOLS = "tool calls are not watched yet"


@pytest.fixture(scope="module")
def firewall(neutraliser: Neutraliser) -> Firewall:
    return Firewall(neutraliser, allow_seed=True)


def refusal(firewall: Firewall, body: dict[str, Any]) -> tuple[str | None, str | None, str]:
    with pytest.raises(Refused) as caught:
        firewall.admit_response(json.dumps(body).encode())
    return caught.value.code, caught.value.param, caught.value.message


def test_a_request_becomes_the_chat_that_it_means(firewall: Firewall) -> None:
    earlier = {
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None,
        "content": [{"type": "output_text", "text": "Hi</think>", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
               "content": [{"type": "reasoning_text", "text": "hm"}]}  # fmt: skip
    asked = {
        "model": "m", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0, "top_k": 5, "seed": 3,
        "stop": ["END"], "stream": True, "store": True, "user": "me", "metadata": {"a": "b"}, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "text": {"format": {"type": "text"}},
        "reasoning": {"summary": "auto", "effort": None}, "include": ["reasoning.encrypted_content"],
        "truncation": "disabled", "background": False, "stream_options": {"include_obfuscation": False},
        "input": [
            {"role": "user", "content": "Hello"}, thought, earlier,
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        ],
    }  # fmt: skip
    admitted = firewall.admit_response(json.dumps(asked).encode())
    assert admitted.body == {
        "model": "m", "temperature": 0.0, "top_k": 5, "max_completion_tokens": 9, "seed": 3, "stop": ["END"],
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi<\u200d/think>"}, {"role": "user", "content": "a\nb"},
        ],
    }  # fmt: skip
    assert (admitted.stream, admitted.wants_usage) == (True, True)
    plain = firewall.admit_response(b'{"input": "Hello"}')
    assert plain.body == {"messages": [{"role": "user", "content": "Hello"}]}
    assert (plain.stream, plain.wants_usage) == (False, False)


def test_every_field_of_the_table_is_refused_with_its_reason(firewall: Firewall) -> None:
    for name, reason in RESPONSES_REFUSED.items():
        if name not in ResponsesRequest.model_fields:
            wanted = ("refused_parameter", name, f"`{name}` is refused: {reason}.")
            assert refusal(firewall, {"input": "x", name: 1}) == wanted


VALUES = [
    ("background", True, f"`background` is refused: {STORED}."),
    ("truncation", "auto", "`truncation` is refused: it can cut the request that the guard scores against."),
    ("reasoning", {"effort": "none"},
     "`reasoning` is refused: only `summary`: an effort can switch the watched reasoning off."),
    ("text", {"format": {"type": "json_object"}},
     "`text` is refused: only plain text: a grammar can forbid the tokens of a trigger."),
    ("tools", [{"type": "function"}], f"`tools` is refused: {TOOLS}."),
    ("tool_choice", "required", f"`tool_choice` is refused: {TOOLS}."),
    ("include", ["message.output_text.logprobs"], "`include` is refused: nothing more can be included."),
    ("input", [], f"`input` is refused: {READS}."),
    ("input", [{"type": "function_call_output", "call_id": "c", "output": "x"}], f"`input` is refused: {READS}."),
    ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
     f"`input` is refused: {READS}."),
    ("input", [{"role": "assistant", "content": "I will", "status": "in_progress"}],
     f"`input` is refused: {READS}."),
    ("temperature", 2.5, "`temperature`: Input should be less than or equal to 2."),
    ("repetition_penalty", 1e30, "`repetition_penalty`: Input should be less than or equal to 2."),
    ("stop", ["a"] * 5, "`stop` is refused: at most 4 stop strings of 1 to 64 characters."),
    ("max_output_tokens", 0, "`max_output_tokens`: Input should be greater than or equal to 1."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_values_are_refused(firewall: Firewall, name: str, value: Any, message: str) -> None:
    assert refusal(firewall, {"input": "x", name: value}) == ("invalid_value", name, message)


def test_what_the_chat_finds_is_told_in_this_routes_words(firewall: Firewall) -> None:
    only = [{"role": "system", "content": "x"}]
    sentence = "`input` holds no user message: the guard scores reasoning against what the user asked."
    assert refusal(firewall, {"input": only}) == ("refused_parameter", "input", sentence)
    known = ", ".join(ResponsesRequest.model_fields)
    assert refusal(firewall, {"input": "x", "zork": 1}) == (
        "unknown_parameter", "zork", f"`zork` is not a parameter of this server; it takes {known}.",
    )  # fmt: skip


def vllm_fields(path: str, name: str) -> set[str]:
    """The fields of one of the installed vLLM's request models, read from its source: the import takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "entrypoints" / "openai" / path
    model = next(n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.ClassDef) and n.name == name)
    return {n.target.id for n in model.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@pytest.mark.parametrize(("path", "name", "ours", "dropped", "refused"), [
    ("chat_completion/protocol.py", "ChatCompletionRequest", ChatRequest, DROPPED, REFUSED),
    ("completion/protocol.py", "CompletionRequest", CompletionRequest, DROPPED, COMPLETIONS_REFUSED),
    ("responses/protocol.py", "ResponsesRequest", ResponsesRequest, RESPONSES_DROPPED, RESPONSES_REFUSED),
])  # fmt: skip
def test_every_field_of_vllms_request_models_was_judged(
    path: str, name: str, ours: Any, dropped: frozenset[str], refused: Any
) -> None:
    """A field that a new vLLM brings is refused as unknown; this test asks for the reason that its users will read."""
    theirs = {n for n in vllm_fields(path, name) if not n.startswith(("_", *REFUSED_PREFIXES))}
    assert len(theirs) > 40
    assert theirs - {*ours.model_fields, *dropped, *refused} == set()
