"""`/v1/responses`: what is taken of a request, and the chat request that it becomes.

vLLM's own route is not used: it ends a response without saying whether a stop string did (so that a trace could not
prove it), continues an unfinished message of the client's, takes the client's own request id, and runs the tools of a
tool server in several generations of one response. As a chat request it passes the one firewall there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from guard.sidecar.fields import DROPPED, MAX_MESSAGES, REFUSED, SAID_BY_USER, VALUE_REASONS, Strict

_TOOLS = "tool calls are not watched yet"
_STORED = "no response is stored here; send the whole conversation in `input`"


class InputPart(Strict):
    """A part of a message; `annotations` and `logprobs` come back with the model's earlier messages."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """One message of a conversation; one that was cut off is a finished turn all the same."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class InputReasoning(Strict):
    """The model's earlier reasoning as clients echo it; it never reaches the engine."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: None = None
    status: Literal["completed", "incomplete"] | None = None


class TextFormat(Strict):
    """Plain text only: a grammar could forbid a forced trigger."""

    type: Literal["text"]


class TextOptions(Strict):
    """Of the text options only the format."""

    format: TextFormat | None = None


class ReasoningOptions(Strict):
    """Of the reasoning options only the summary, which no model here writes."""

    summary: Literal["auto", "concise", "detailed"] | None = None
    effort: None = None


class ResponseStreamOptions(Strict):
    """Padding against traffic analysis, which is not added here."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Strict):
    """The fields that are taken; what is sampled with passes `ChatRequest` afterwards."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[InputMessage | InputReasoning, Field(union_mode="left_to_right")]],
            Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra=dict(SAID_BY_USER)),
        ]
    )
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


#: Fields of `ChatRequest` that mean the same here.
SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "seed", "stop", "stream",
)  # fmt: skip

#: Fields that OpenAI clients send and that change nothing here.
RESPONSES_DROPPED = (DROPPED - {"metadata"}) | {"max_tool_calls", "prompt_cache_retention"}

#: Fields refused with a reason of their own, beside those that no route takes.
RESPONSES_REFUSED: Mapping[str, str] = {
    **REFUSED,
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "previous_input_messages": "messages travel in `input`",
    "messages": "messages travel in `input`",
    "max_tokens": "it is called `max_output_tokens` here",
    "max_completion_tokens": "it is called `max_output_tokens` here",
    "prompt": "a stored prompt is not what the guard would read",
    "logprobs": "this route gives none",
    "top_logprobs": "this route gives none",
    "enable_response_messages": "what the engine sees is no part of a response",
    "n": "one receipt proves one output",
}

#: Sentences for fields that are taken, but not with this value.
RESPONSES_VALUE_REASONS: Mapping[str, str] = {
    "text": VALUE_REASONS["response_format"],
    "reasoning": "only `summary`: an effort can switch the watched reasoning off",
    "include": "nothing more can be included",
    "truncation": "it can cut the request that the guard scores against",
    "background": _STORED,
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "input": "it takes text and messages of text: the guard reads nothing else, and tool calls are not watched yet",
}


def as_chat(request: ResponsesRequest) -> dict[str, Any]:
    """The fields of the chat request that it asks for."""
    fields = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += [_message(item) for item in request.input if isinstance(item, InputMessage)]
    return {**fields, "messages": messages}


def _message(item: InputMessage) -> dict[str, Any]:
    if isinstance(item.content, str):
        return {"role": item.role, "content": item.content}
    return {"role": item.role, "content": [{"type": "text", "text": part.text} for part in item.content]}
