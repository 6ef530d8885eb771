"""`/v1/completions`, where `serve --completions` turns it on: what is taken, and how a completion is worded.

A raw prompt has no template, so nothing tells where the model's reasoning begins, and what the client wrote may itself
be half a thought. Two rules make up for it. The prompt holds no special token: only the model can open or close a zone
(a chat's templates are what `/v1/chat/completions` is for). And every zone is watched, whatever the policy's `zones`
say (`Tenant.watching_all`): the whole output is the model's, and none of it goes unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from guard.sidecar.fields import REFUSED, VALUE_REASONS, Sampling
from guard.sidecar.wording import DONE, data

_KIND = "text_completion"
_TOOLS = "tools belong to /v1/chat/completions"


class CompletionRequest(Sampling):
    """The fields that are taken. Left out, `max_tokens` is 16, as everywhere."""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: int = Field(default=16, ge=1, le=1_000_000)


#: Fields refused with a reason of their own, beside those that no route takes.
COMPLETIONS_REFUSED: Mapping[str, str] = {
    **REFUSED,
    "suffix": "the guard reads what comes before the text, and nothing after it",
    "logprobs": "this route gives none",
    "messages": "messages belong to /v1/chat/completions",
    "max_completion_tokens": "it is called `max_tokens` here",
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
}

#: Sentences for fields that are taken, but not with this value.
COMPLETIONS_VALUE_REASONS: Mapping[str, str] = {
    **VALUE_REASONS,
    "prompt": "it is one text: several would need a receipt each, and token ids could be special tokens",
}


class CompletionsWording:
    """Text without fields: what the engine completed comes as it is, what the sidecar says itself comes as a chat."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The body: reasoning and answer are one text."""
        return answer if answer.get("object") == _KIND else _completion(answer, "message")

    def event(self, event: dict[str, Any], raw: bytes) -> Iterable[bytes]:
        """One chunk; one that only names a role says nothing here."""
        if event.get("object") == _KIND:
            yield b"data: " + raw + b"\n\n"
            return
        said = _completion(event, "delta")
        if any(choice["text"] or choice["finish_reason"] for choice in said["choices"]):
            yield data(said)

    def last(self, event: dict[str, Any]) -> Iterable[bytes]:
        """The receipt, in an event without choices."""
        yield data(_completion(event, "delta"))
        yield DONE


def _completion(chat: dict[str, Any], holds: str) -> dict[str, Any]:
    """A chat completion or one of its chunks as a text completion; `holds`: the key of a choice's text."""
    named = {"id": chat["id"].replace("chatcmpl-", "cmpl-")} if "id" in chat else {}
    choices = [
        {
            "index": choice["index"],
            "text": "".join(choice[holds].get(field) or "" for field in ("reasoning", "content")),
            "logprobs": None,
            "finish_reason": choice["finish_reason"],
        }
        for choice in chat["choices"]
    ]
    return {**chat, **named, "object": _KIND, "choices": choices}
