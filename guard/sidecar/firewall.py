"""The parameter firewall: an allow-list between clients and the engine.

A request is parsed strictly, checked field by field against `guard.sidecar.fields`, and *rebuilt*: only what was
understood reaches the engine. Text that spells a special token is broken up, so that a message can neither open nor
close a turn or a reasoning block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from guard.sidecar.completions import (
    COMPLETIONS_REFUSED,
    COMPLETIONS_VALUE_REASONS,
    CompletionRequest,
    CompletionsWording,
)
from guard.sidecar.errors import Refused
from guard.sidecar.fields import (
    DROPPED,
    ECHOED,
    NOT_SENT,
    REFUSED,
    REFUSED_PREFIXES,
    VALUE_REASONS,
    ChatRequest,
    Message,
    Sampling,
)
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.responses import ResponsesWording
from guard.sidecar.responses_fields import (
    RESPONSES_DROPPED,
    RESPONSES_REFUSED,
    RESPONSES_VALUE_REASONS,
    ResponsesRequest,
    as_chat,
)
from guard.sidecar.wording import ChatWording, Wording

MAX_BODY = 2 * 1024 * 1024
_NO_SEED = "a seed per request can stop the engine on a CPU; start it with `-- --seed N` instead"

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Admitted:
    """A request that may go on: the engine's body without guard arguments, and what the client asked of us."""

    body: dict[str, Any]
    stream: bool
    wants_usage: bool
    wording: Wording
    raw: bool = False
    """It is a text to be completed, not a chat."""

    @property
    def request(self) -> str:
        """What is asked: the last user message, or all of a raw prompt. Steps are scored against it."""
        if self.raw:
            return str(self.body["prompt"]).strip()
        return str(next(m["content"] for m in reversed(self.body["messages"]) if m["role"] == "user")).strip()


class Firewall:
    """Checks and rebuilds requests; pure, usable from any thread."""

    def __init__(self, neutraliser: Neutraliser, *, allow_seed: bool) -> None:
        self._neutraliser = neutraliser
        self._allow_seed = allow_seed

    def admit(self, raw: bytes) -> Admitted:
        """A chat request as the engine may see it; Refused says in a sentence what is wrong."""
        fields = {k: v for k, v in _object(raw).items() if v is not None and k not in DROPPED}
        _check_names(fields, ChatRequest, REFUSED)
        if isinstance(fields.get("messages"), list):
            fields["messages"] = [_without_echoes(m) for m in fields["messages"]]
        request = _parsed(ChatRequest, fields, VALUE_REASONS)
        return Admitted(self._body(request), request.stream, request.wants_usage, ChatWording())

    def admit_response(self, raw: bytes) -> Admitted:
        """The same for `/v1/responses`: what is left of it is a chat request."""
        fields = {k: v for k, v in _object(raw).items() if v is not None and k not in RESPONSES_DROPPED}
        _check_names(fields, ResponsesRequest, RESPONSES_REFUSED)
        if isinstance(fields.get("input"), list):
            fields["input"] = [_without_nothing(item) for item in fields["input"]]
        asked = _parsed(ResponsesRequest, fields, RESPONSES_VALUE_REASONS)
        request = _parsed(ChatRequest, as_chat(asked), VALUE_REASONS)
        try:
            body = self._body(request)
        except Refused as error:
            if error.param != "messages":
                raise
            raise Refused(error.message.replace("`messages`", "`input`"), param="input", code=error.code) from error
        return Admitted(body, request.stream, request.stream, ResponsesWording(asked))

    def admit_completion(self, raw: bytes) -> Admitted:
        """The same for `/v1/completions`. Its prompt is refused where a message would be broken up: whoever spells
        special tokens in it has rendered a template, and would be answered as if it were none."""
        fields = {k: v for k, v in _object(raw).items() if v is not None and k not in DROPPED}
        _check_names(fields, CompletionRequest, COMPLETIONS_REFUSED)
        request = _parsed(CompletionRequest, fields, COMPLETIONS_VALUE_REASONS)
        if self._neutraliser.found_in(request.prompt):
            raise Refused(
                "`prompt` spells a special token of the model: /v1/chat/completions renders its template.",
                param="prompt",
            )
        return Admitted(self._sent(request), request.stream, request.wants_usage, CompletionsWording(), raw=True)

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """The request rebuilt."""
        if not any(message.role == "user" for message in request.messages):
            raise Refused(
                "`messages` holds no user message: the guard scores reasoning against what the user asked.",
                param="messages",
            )
        return {**self._sent(request), "messages": [self._message(message) for message in request.messages]}

    def _sent(self, request: Sampling) -> dict[str, Any]:
        """The fields that go on as they are."""
        if request.seed is not None and not self._allow_seed:
            raise Refused(f"`seed` is refused: {_NO_SEED}.", param="seed")
        return request.model_dump(exclude_none=True, exclude=set(NOT_SENT))

    def _message(self, message: Message) -> dict[str, str]:
        """One rebuilt message. Parts are joined as the engine would, so that no token can be spelled across two."""
        content = message.content
        text = "\n".join(part.text for part in content) if isinstance(content, list) else content or ""
        role = "system" if message.role == "developer" else message.role
        clean = {"role": role, "content": self._neutraliser.clean(text)}
        for key in ("name", "tool_call_id"):
            value = getattr(message, key)
            if value:
                clean[key] = self._neutraliser.clean(value)
        return clean


def _object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, parse_constant=_no_constant)
        # A lone surrogate has no bytes: the engine's tokenizer would fail on it.
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused("The body is not JSON in UTF-8.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise Refused("The body is not a JSON object.", code="invalid_json")
    return parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_names(fields: Iterable[str], taken: type[BaseModel], refused: Mapping[str, str]) -> None:
    for name in fields:
        if name in taken.model_fields:
            continue
        reason = refused.get(name) or next((r for p, r in REFUSED_PREFIXES.items() if name.startswith(p)), None)
        if reason is not None:
            raise Refused(f"`{name}` is refused: {reason}.", param=name)
        known = ", ".join(taken.model_fields)
        short = name[:64]
        raise Refused(
            f"`{short}` is not a parameter of this server; it takes {known}.", param=short, code="unknown_parameter"
        )


def _parsed(model: type[M], fields: dict[str, Any], reasons: Mapping[str, str]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        _explain(error, reasons)


def _without_nothing(item: Any) -> Any:
    """Drops what says nothing: clients write out every field of what they echo."""
    return {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item


def _without_echoes(message: Any) -> Any:
    """Drops what clients echo back with the model's earlier messages, and everything that says nothing."""
    if not isinstance(message, dict):
        return message
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise Refused(f"`messages` with `{name}` are refused: tool calls are not watched yet.", param="messages")
    return {k: v for k, v in message.items() if k not in ECHOED and v is not None and v != []}


def _explain(error: ValidationError, reasons: Mapping[str, str]) -> NoReturn:
    """Turns pydantic's first finding into a sentence."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    field = where[0] if where else "body"
    reason = reasons.get(field)
    if reason is not None:
        raise Refused(f"`{field}` is refused: {reason}.", param=field, code="invalid_value") from error
    if "content" in where:
        sentence = "`messages` take text only: the guard reads nothing else."
        raise Refused(sentence, param=field, code="invalid_value") from error
    path = ".".join(where)
    raise Refused(f"`{path}`: {first['msg']}.", param=field, code="invalid_value") from error
