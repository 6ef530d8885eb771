"""The parameter firewall: an allow-list between clients and the engine.

A request is parsed strictly, checked field by field against `guard.sidecar.fields`, and *rebuilt*: only what was
understood reaches the engine. Text that spells a special token is broken up, so that a message can neither open nor
close a turn or a reasoning block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

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
)
from guard.sidecar.neutral import Neutraliser

MAX_BODY = 2 * 1024 * 1024
_NO_SEED = "a seed per request can stop the engine on a CPU; start it with `-- --seed N` instead"


@dataclass(frozen=True)
class Admitted:
    """A request that may go on: the engine's body without guard arguments, and what the client asked of us."""

    body: dict[str, Any]
    stream: bool
    wants_usage: bool


class Firewall:
    """Checks and rebuilds requests; pure, usable from any thread."""

    def __init__(self, neutraliser: Neutraliser, *, allow_seed: bool) -> None:
        self._neutraliser = neutraliser
        self._allow_seed = allow_seed

    def admit(self, raw: bytes) -> Admitted:
        """The request as the engine may see it; Refused says in a sentence what is wrong."""
        fields = _object(raw)
        fields = {k: v for k, v in fields.items() if v is not None and k not in DROPPED}
        for name in fields:
            _check_name(name)
        if "seed" in fields and not self._allow_seed:
            raise Refused(f"`seed` is refused: {_NO_SEED}.", param="seed")
        if isinstance(fields.get("messages"), list):
            fields["messages"] = [_without_echoes(m) for m in fields["messages"]]
        try:
            request = ChatRequest.model_validate(fields)
        except ValidationError as error:
            _explain(error)
        if not any(message.role == "user" for message in request.messages):
            raise Refused(
                "`messages` holds no user message: the guard scores reasoning against what the user asked.",
                param="messages",
            )
        body = request.model_dump(exclude_none=True, exclude=set(NOT_SENT))
        body["messages"] = [self._message(message) for message in request.messages]
        wants_usage = request.stream and request.stream_options is not None and request.stream_options.include_usage
        return Admitted(body, request.stream, wants_usage)

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


def _check_name(name: str) -> None:
    if name in ChatRequest.model_fields:
        return
    reason = REFUSED.get(name) or next((r for p, r in REFUSED_PREFIXES.items() if name.startswith(p)), None)
    if reason is not None:
        raise Refused(f"`{name}` is refused: {reason}.", param=name)
    known = ", ".join(ChatRequest.model_fields)
    short = name[:64]
    raise Refused(
        f"`{short}` is not a parameter of this server; it takes {known}.", param=short, code="unknown_parameter"
    )


def _without_echoes(message: Any) -> Any:
    """Drops what clients echo back with the model's earlier messages, and everything that says nothing."""
    if not isinstance(message, dict):
        return message
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise Refused(f"`messages` with `{name}` are refused: tool calls are not watched yet.", param="messages")
    return {k: v for k, v in message.items() if k not in ECHOED and v is not None and v != []}


def _explain(error: ValidationError) -> NoReturn:
    """Turns pydantic's first finding into a sentence."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    field = where[0] if where else "body"
    reason = VALUE_REASONS.get(field)
    if reason is not None:
        raise Refused(f"`{field}` is refused: {reason}.", param=field, code="invalid_value") from error
    if "content" in where:
        sentence = "`messages` take text only: the guard reads nothing else."
        raise Refused(sentence, param=field, code="invalid_value") from error
    path = ".".join(where)
    raise Refused(f"`{path}`: {first['msg']}.", param=field, code="invalid_value") from error
