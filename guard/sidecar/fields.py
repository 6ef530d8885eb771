"""The tables of the parameter firewall: what is taken, what is dropped, what is refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_MESSAGES = 2048

#: How the OpenAPI document says that the user must have asked something; `Firewall` checks it.
SAID_BY_USER = {"contains": {"type": "object", "required": ["role"], "properties": {"role": {"const": "user"}}}}

StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class Strict(BaseModel):
    """Takes its own fields and types only."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """The one kind of content part that the guard can read."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None


class StreamOptions(Strict):
    """Of the stream options only the usage chunk."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """Plain text only: a grammar could forbid a forced trigger."""

    type: Literal["text"]


class Sampling(Strict):
    """What every route takes, within the ranges that vLLM and OpenAI document; a forced token wins under any."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.5, le=2)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    response_format: ResponseFormat | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with its usage."""
        return self.stream and self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    """The fields of a chat that reach the engine."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra=dict(SAID_BY_USER))
    ]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tool_choice: Literal["none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


#: Checked but never sent on: the engine's own default is the only value taken.
NOT_SENT = frozenset({"n", "response_format", "tool_choice", "tools", "stream", "stream_options", "messages"})

#: Fields that OpenAI clients send and that change nothing here.
DROPPED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)

#: Message fields that clients echo back from a response; none of them reaches the engine.
ECHOED = frozenset({"reasoning", "reasoning_content", "refusal", "annotations", "audio"})

_MASK = "it can forbid the tokens of a trigger"
_GRAMMAR = "a grammar can forbid the tokens of a trigger"
_TEMPLATE = "the guard reads the request and the start of the reasoning from the model's own template"
_TEXT = "the guard reads text only"
_TOOLS = "tool calls are not watched yet"
_INSIDE = "what the engine sees is no part of a response"
_CACHE = "it reaches into the engine's cache"
_IDS = "guard arguments belong to the operator"

#: Fields refused with a reason of their own; anything else that is unknown is refused as unknown.
REFUSED: Mapping[str, str] = {
    "thinking_token_budget": "it is applied after the guard and wins over a forced trigger",
    "reasoning_effort": "it can switch the watched reasoning off",
    "include_reasoning": "it hides the watched reasoning from the response",
    "logit_bias": "it changes which tokens may come next, and a trigger must always be free to come",
    "bad_words": _MASK,
    "allowed_token_ids": _MASK,
    "structured_outputs": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "use_beam_search": "beam search takes no guard",
    "best_of": "one receipt proves one output",
    "length_penalty": "it belongs to beam search, which takes no guard",
    "continue_final_message": "it would let the client write the model's reasoning",
    "add_generation_prompt": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "documents": _TEMPLATE,
    "echo": "it would let the client write the model's reasoning",
    "stop_token_ids": "it can end the output before a trigger has come",
    "include_stop_str_in_output": "it changes where an output ends",
    "ignore_eos": "the guard must be able to end an output",
    "min_tokens": "the guard must be able to end an output",
    "skip_special_tokens": "special tokens mark where the reasoning ends",
    "spaces_between_special_tokens": "special tokens mark where the reasoning ends",
    "prompt_logprobs": "it takes the prompt past the prefix cache and tells nothing of the answer",
    "prompt_embeds": _TEXT,
    "mm_processor_kwargs": _TEXT,
    "media_io_kwargs": _TEXT,
    "modalities": _TEXT,
    "audio": _TEXT,
    "truncate_prompt_tokens": "it can cut the request that the guard scores against",
    "truncation_side": "it can cut the request that the guard scores against",
    "priority": "the operator decides about priorities",
    "request_id": "the sidecar gives every request its own id",
    "vllm_xargs": _IDS,
    "kv_transfer_params": _CACHE,
    "ec_transfer_params": _CACHE,
    "cache_salt": _CACHE,
    "session_id": "the sidecar gives every request its own id",
    "watermarking": "it changes which tokens may come next, and a trigger must always be free to come",
    "repetition_detection": "it can end the output before a trigger has come",
    "stream_interval": "the operator decides how text is streamed",
    "logprob_token_ids": _INSIDE,
    "return_token_ids": _INSIDE,
    "return_tokens_as_token_ids": _INSIDE,
    "return_token_offsets": _INSIDE,
    "return_prompt_text": _INSIDE,
    "routed_experts_prompt_start": _INSIDE,
    "mm_payload": _TEXT,
    "return_mm_kwargs": _TEXT,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "web_search_options": _TOOLS,
}

#: The same for whole families of fields.
REFUSED_PREFIXES: Mapping[str, str] = {
    "guard_": _IDS,
    "guided_": _GRAMMAR,
    "chat_template": _TEMPLATE,
}

#: Sentences for fields that are taken, but not with this value.
VALUE_REASONS: Mapping[str, str] = {
    "n": "only one choice per request: one receipt proves one output",
    "response_format": f"only plain text: {_GRAMMAR}",
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "stop": f"at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARS} characters",
}
