"""A scripted engine without a guard, over real HTTP: the routes of vLLM that `serve --upstream` needs, on the tiny
model's tokens. It dies, breaks off or leaves ids out when a test says so, which a real engine does not do on demand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.tiny import reasoning_words, successors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 400


@dataclass
class Unguarded:
    """What the engine does, and what it was asked."""

    tokenizer: Tokenizer
    model: str = "tiny"
    well: bool = True
    """What /health says."""
    refuses_key: bool = False
    gives_ids: bool = True
    break_after: int | None = None
    """Cut the connection after so many tokens."""
    ends_after: int | None = None
    """End the stream there, without a finish."""
    says: bytes | None = None
    """Instead of a stream's events."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """Models that it lists behind its own."""
    hold: threading.Event | None = None
    """The third token waits for it."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        chains = [[self.tokenizer.token_to_id(word) for word in chain] for chain in reasoning_words()]
        self._next = successors(chains)
        self._eos = self.tokenizer.token_to_id("<|im_end|>")

    def app(self) -> Starlette:
        """The routes that the sidecar calls."""
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/health", lambda _: Response(status_code=200 if self.well else 503)),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    def _models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        if self.refuses_key:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"object": "list", "data": [{"id": self.model, "root": "/m"}, *self.cards]})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        if (body.get("model") or self.model) != self.model:
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        text = body.get("prompt")
        if text is None:
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"]]
            text = "".join(turns) + "<|im_start|>assistant\n<think>\n"
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": CONTEXT})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        if (body.get("model") or self.model) != self.model:
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        self.asked.append(body)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str | bytes]:
        if self.says is not None:
            yield self.says
            return
        token, most = body["prompt"][-1], body["max_tokens"]
        for count in range(1, most + 1):
            if self.break_after is not None and count > self.break_after:
                raise RuntimeError("scripted break")
            if self.ends_after is not None and count > self.ends_after:
                return
            if count == 3 and self.hold is not None:
                while not self.hold.is_set():
                    await asyncio.sleep(0.01)
            # A raw prompt may end with a word that no script goes on from.
            token = self._next.get(token, self._eos)
            finish = "stop" if token == self._eos else "length" if count == most else None
            choice = {"index": 0, "text": self.tokenizer.decode([token]), "finish_reason": finish}
            if self.gives_ids:
                choice["token_ids"] = [token]
            yield f"data: {json.dumps({'id': 'cmpl-1', 'choices': [choice]})}\n\n"
            if finish is not None:
                break
        yield "data: [DONE]\n\n"
