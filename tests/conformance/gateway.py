"""What the checks share: a client of one gateway, and the ways in which a check ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"
RECEIPT_HEADER = "x-reasonguard-receipt"
QUESTION = "Say hello."


class Failed(Exception):
    """The gateway did not do what the check asks for."""


class Skipped(Exception):
    """The gateway does not offer this, and says so."""


def need(condition: object, reason: str) -> None:
    """Failed unless the condition holds."""
    if not condition:
        raise Failed(reason)


@dataclass
class Gateway:
    """One gateway under test. `model`: the name to ask for; empty: the first that it lists."""

    http: httpx.Client
    model: str = ""
    special: tuple[str, ...] = ("</think>", "<|im_end|>")
    """Spellings of the model's special tokens."""
    max_body: int = 8 * 1024 * 1024
    """A body of this many bytes must be refused."""
    _model: str = field(default="", init=False)

    def named(self) -> str:
        """The model to ask for."""
        if not self._model:
            self._model = self.model or str(self.http.get("/v1/models").json()["data"][0]["id"])
        return self._model

    def body(self, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
        """A small chat request."""
        base = {"model": self.named(), "messages": [{"role": "user", "content": text}], "max_tokens": 48}
        return {**base, "temperature": 0, **fields}

    def chat(self, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
        """A chat completion's body; Failed unless it is one."""
        return self.answered(self.http.post(CHAT, json=self.body(text, **fields)))

    def answered(self, response: httpx.Response) -> dict[str, Any]:
        """The body of a response that must be 200."""
        need(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
        found: dict[str, Any] = response.json()
        return found

    def events(self, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
        """A whole stream's events."""
        bodies = {CHAT: self.body, RESPONSES: self.response_body, COMPLETIONS: self.completion_body}
        response = self.http.post(path, json={**bodies[path](), "stream": True, **fields})
        need(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
        kind = response.headers["content-type"]
        need(kind.startswith("text/event-stream"), f"content-type {kind}")
        lines = [line[5:].strip() for line in response.text.split("\n") if line.startswith("data:")]
        if path != RESPONSES:
            need(lines and lines[-1] == "[DONE]", "the stream does not end with [DONE]")
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def response_body(self, **fields: Any) -> dict[str, Any]:
        """A small request of the responses route."""
        return {"model": self.named(), "input": QUESTION, "max_output_tokens": 48, "temperature": 0, **fields}

    def response(self, **fields: Any) -> httpx.Response:
        """What the responses route says; Skipped where there is none."""
        response = self.http.post(RESPONSES, json=self.response_body(**fields))
        if response.status_code == 404:
            raise Skipped("there is no /v1/responses")
        return response

    def completion_body(self, **fields: Any) -> dict[str, Any]:
        """A small request of the completions route."""
        return {"model": self.named(), "prompt": QUESTION, "max_tokens": 48, "temperature": 0, **fields}

    def completion(self, **fields: Any) -> httpx.Response:
        """What the completions route says; Skipped where there is none."""
        response = self.http.post(COMPLETIONS, json=self.completion_body(**fields))
        if response.status_code in (403, 404):
            raise Skipped(refused(response, 403, 404))
        return response


Check = Callable[[Gateway], None]


def spoken(answer: dict[str, Any]) -> str:
    """Reasoning and content of a chat completion, as one text."""
    message = answer["choices"][0]["message"]
    return (message.get("reasoning") or message.get("reasoning_content") or "") + (message.get("content") or "")


def streamed(events: list[dict[str, Any]]) -> str:
    """The same of a stream."""
    deltas = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    reasoning = "".join(d.get("reasoning") or d.get("reasoning_content") or "" for d in deltas)
    return reasoning + "".join(d.get("content") or "" for d in deltas)


def refused(response: httpx.Response, *statuses: int) -> str:
    """The sentence of a refusal in OpenAI's shape; Failed when it is none."""
    need(response.status_code in (statuses or (400,)), f"HTTP {response.status_code}: {response.text[:160]}")
    try:
        error = response.json()["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError) as broken:
        raise Failed(f"no error in OpenAI's shape: {response.text[:160]}") from broken
    need(isinstance(message, str) and len(message) > 10, f"no sentence: {message!r}")
    need("type" in error, "the error has no `type`")
    return str(message)


def receipt(response: httpx.Response) -> dict[str, Any]:
    """The receipt in a response's header."""
    need(RECEIPT_HEADER in response.headers, f"no header {RECEIPT_HEADER}")
    found: dict[str, Any] = json.loads(response.headers[RECEIPT_HEADER])
    return found
