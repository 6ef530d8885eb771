"""`/v1/responses` in OpenAI's words: one response object, or its events, out of a chat completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from guard.sidecar.responses_fields import ResponsesRequest
from guard.sidecar.wording import data

Kind = Literal["reasoning", "message"]
_KINDS: dict[str, Kind] = {"reasoning": "reasoning", "content": "message"}
_PREFIX: dict[Kind, str] = {"reasoning": "rs", "message": "msg"}
#: Event names of a part's text, by item.
_TEXT: dict[Kind, str] = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


class ResponsesWording:
    """One response under way; a stream's events are numbered and its items grow here."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._request = request
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open = False
        """Whether the last item of `_output` still grows."""
        self._number = 0
        self._model = request.model or ""
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The response object of a finished chat completion."""
        (choice,) = answer["choices"]
        self._model = answer.get("model") or self._model
        self._usage, self._finish = answer.get("usage"), choice["finish_reason"]
        for field, kind in _KINDS.items():
            text = choice["message"].get(field)
            if text or kind == "message":
                self._output.append(_item(kind, text or ""))
        return {**self._response(self._status()), "reasonguard": answer["reasonguard"]}

    def event(self, event: dict[str, Any], raw: bytes) -> Iterable[bytes]:
        """What a chat chunk adds: items open, grow and close in the order in which the model writes."""
        self._model = event.get("model") or self._model
        self._usage = event.get("usage") or self._usage
        yield from self._begun()
        for choice in event.get("choices", ()):
            for field, kind in _KINDS.items():
                if text := choice["delta"].get(field):
                    yield from self._grow(kind, text)
            self._finish = choice.get("finish_reason") or self._finish

    def last(self, event: dict[str, Any]) -> Iterable[bytes]:
        """Closes what is open; the last event's response carries the receipt, and `error` where there is one."""
        self._usage = event.get("usage") or self._usage
        yield from self._begun()
        yield from self._close()
        error = event.get("error")
        status = "failed" if error is not None else self._status()
        response = {**self._response(status), "reasonguard": event["reasonguard"]}
        if error is not None:
            response["error"] = {"code": "server_error", "message": error["message"]}
        yield self._sent(f"response.{status}", response=response)

    def _begun(self) -> Iterator[bytes]:
        if self._number == 0:
            for name in ("response.created", "response.in_progress"):
                yield self._sent(name, response=self._response("in_progress"))

    def _grow(self, kind: Kind, text: str) -> Iterator[bytes]:
        if not self._open or self._output[-1]["type"] != kind:
            yield from self._close()
            yield from self._begin(kind)
        part = self._output[-1]["content"][0]
        part["text"] += text
        yield self._sent(f"{_TEXT[kind]}.delta", **self._place(), delta=text, **_logprobs(kind))

    def _begin(self, kind: Kind) -> Iterator[bytes]:
        item = _item(kind, "")
        self._output.append(item)
        self._open = True
        shown = {**item, "status": "in_progress", "content": []}
        yield self._sent("response.output_item.added", output_index=len(self._output) - 1, item=shown)
        yield self._sent("response.content_part.added", **self._place(), part=item["content"][0])

    def _close(self) -> Iterator[bytes]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        kind, part = item["type"], item["content"][0]
        yield self._sent(f"{_TEXT[kind]}.done", **self._place(), text=part["text"], **_logprobs(kind))
        yield self._sent("response.content_part.done", **self._place(), part=part)
        yield self._sent("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _sent(self, name: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return data({"type": name, "sequence_number": number, **fields}, name)

    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        request = self._request
        done = status != "in_progress"
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "model": self._model,
            "output": self._output if done else [], "usage": _usage(self._usage) if done else None, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "temperature": request.temperature, "top_p": request.top_p, "metadata": request.metadata or {},
            "background": False, "store": False, "previous_response_id": None, "truncation": "disabled",
            "parallel_tool_calls": False, "tool_choice": "none", "tools": [], "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
        }  # fmt: skip


def _item(kind: Kind, text: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": f"{_PREFIX[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "completed"}
    if kind == "reasoning":
        return {**item, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
    return {
        **item, "role": "assistant",
        "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
    }  # fmt: skip


def _logprobs(kind: Kind) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


def _usage(chat: dict[str, Any] | None) -> dict[str, Any] | None:
    """A chat's usage in this route's names; what was cached and what was reasoning is not told apart."""
    if chat is None:
        return None
    return {
        "input_tokens": chat["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": chat["total_tokens"],
    }  # fmt: skip
