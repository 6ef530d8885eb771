"""`GET /openapi.json`: what the sidecar takes and answers, as OpenAPI 3.1, from the models that the firewall checks by.

It holds no content and no secret, so that it is open like `/health`: a client reads it before it has a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from guard.sidecar.completions import CompletionRequest
from guard.sidecar.fields import DROPPED, ECHOED, ChatRequest, Message
from guard.sidecar.proof import ID_HEADER, RECEIPT_HEADER, Attached
from guard.sidecar.responses_fields import RESPONSES_DROPPED, SAMPLING, ResponsesRequest

PATH = "/openapi.json"
Schema = dict[str, Any]
_REFS = "#/components/schemas/"


class ErrorDetail(BaseModel):
    """What went wrong, in a sentence."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class Error(BaseModel):
    """Every response that is no answer, in OpenAI's shape."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the engine's process lives."""

    status: str


class NotReady(BaseModel):
    """Why no request is taken."""

    ready: Literal[False]
    reason: str


#: Requests, and the fields beside their own that are taken and dropped.
_REQUESTS: Mapping[type[BaseModel], frozenset[str]] = {
    ChatRequest: DROPPED, CompletionRequest: DROPPED, ResponsesRequest: RESPONSES_DROPPED, Message: ECHOED,
}  # fmt: skip
_ANSWERS = (Attached, Error, Health, NotReady)

_REFUSALS: Mapping[int, str] = {
    400: "Refused by the parameter firewall, or by the engine.",
    401: "No key that is known here (`serve --keys`).",
    404: "The engine has no such model, or `/v1/completions` is off (`serve --completions`).",
    408: "The body did not come in time.",
    413: "The body is too large.",
    422: "The engine cannot read it.",
    429: "Beyond a quota; `Retry-After` says for how long.",
    500: "The sidecar failed.",
    502: "The engine failed, or the response could not be proven guarded and the policy fails closed.",
    503: "No engine, no proven guard, or too many requests under way.",
    504: "It took longer than one request may.",
}


def document() -> Schema:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Reasonguard's sidecar",
            "version": version("reasonguard"),
            "description": "An OpenAI-compatible front for a guarded reasoning model. docs/serve.md says more.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _guarded("Chat completion", ChatRequest, "choices")},
            "/v1/responses": {"post": _guarded("Response", ResponsesRequest, "output")},
            "/v1/completions": {"post": _guarded("Completion of a raw prompt", CompletionRequest, "choices")},
            "/v1/models": {"get": _models()},
            "/guard/admin/reload": {"post": _reload()},
            "/health": {"get": _health()},
            "/ready": {"get": _ready()},
            "/metrics": {"get": _operation("Prometheus metrics", {200: _content("Text.", "text/plain")})},
            PATH: {"get": _operation("This document", {200: _json("OpenAPI 3.1.", {"type": "object"})})},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key, where `serve` has --keys."},
                "operator": {"type": "http", "scheme": "bearer", "description": "The operator's token."},
            },
        },
    }


async def openapi(request: Request) -> Response:
    """The document."""
    return JSONResponse(document())


def _guarded(summary: str, model: type[BaseModel], holds: str) -> Schema:
    """A route whose response is guarded and carries a receipt; `holds`: where its text is."""
    answer = {
        "type": "object", "required": [holds, "reasonguard"],
        "properties": {holds: {"type": "array"}, "reasonguard": _ref(Attached)},
    }  # fmt: skip
    answered = _json("With its receipt; a stream's last event carries it.", answer)
    answered["content"]["text/event-stream"] = {}
    answered["headers"] = {
        ID_HEADER: {"description": "The id of its trace.", "schema": {"type": "string"}},
        RECEIPT_HEADER: {"description": "The receipt as JSON; not on a stream.", "schema": {"type": "string"}},
    }
    body = {"required": True, "content": {"application/json": {"schema": _ref(model)}}}
    asked = _operation(summary, {200: answered, **_errors(_REFUSALS)}, keys=True)
    return {**asked, "requestBody": body}


def _models() -> Schema:
    listed = {"type": "object", "required": ["data"], "properties": {"data": {"type": "array"}}}
    responses = {200: _json("As the engine lists them.", listed), **_errors((401, 500, 503))}
    return _operation("The engine's models", responses, keys=True)


def _reload() -> Schema:
    said = {"type": "object", "required": ["reloaded", "problem"]}
    responses = {
        200: _json("Everything was read again and is in force.", said),
        409: _json("Something is wrong; what was in force stays.", said),
        **_errors((401, 404, 500)),
    }
    return {**_operation("Take changed files over", responses), "security": [{"operator": []}]}


def _health() -> Schema:
    responses = {200: _json("It lives.", _ref(Health)), 503: _json("It does not.", _ref(Health)), **_errors((500,))}
    return _operation("Whether the engine lives", responses)


def _ready() -> Schema:
    ready = {"type": "object", "required": ["ready"], "properties": {"ready": {"const": True}}}
    responses = {
        200: _json("A trigger was really forced within the last minute.", ready),
        503: _json("It was not.", _ref(NotReady)), **_errors((500,)),
    }  # fmt: skip
    return _operation("Whether the guard was proven", responses)


def _operation(summary: str, responses: Mapping[int, Schema], *, keys: bool = False) -> Schema:
    # A key is asked for where `serve` was given any.
    asked: list[Schema] = [{"key": []}, {}] if keys else []
    return {"summary": summary, "responses": {str(s): r for s, r in sorted(responses.items())}, "security": asked}


def _errors(statuses: Iterable[int]) -> dict[int, Schema]:
    return {status: _json(_REFUSALS[status], _ref(Error)) for status in statuses}


def _json(description: str, schema: Schema) -> Schema:
    return _content(description, "application/json", schema)


def _content(description: str, kind: str, schema: Schema | None = None) -> Schema:
    return {"description": description, "content": {kind: {"schema": schema or {"type": "string"}}}}


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": _REFS + model.__name__}


def _schemas() -> Schema:
    """All models; what a request may hold and is dropped is written into it, since nothing else is taken."""
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in _REQUESTS]
    modes += [(model, "serialization") for model in _ANSWERS]
    _, found = models_json_schema(modes, ref_template=_REFS + "{model}")
    schemas: Schema = found["$defs"]
    for model, dropped in _REQUESTS.items():
        properties = schemas[model.__name__]["properties"]
        for name in sorted(dropped - model.model_fields.keys()):
            properties[name] = {"description": "Taken, and changes nothing here."}
    # What they mean the same by is checked as a chat request's.
    chat = schemas[ChatRequest.__name__]["properties"]
    schemas[ResponsesRequest.__name__]["properties"] |= {name: chat[name] for name in SAMPLING}
    return schemas
