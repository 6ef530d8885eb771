"""A scripted engine over real HTTP: it says and writes exactly what a test tells it, so that a missing, torn or
contradicting receipt can be shown to the sidecar, which the real guard never produces."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from guard.engine.session import PROBE_POLICY
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.traces import Intervention, Receipt, Spool, StepRecord, Trace

WORDS = ["One", " two", " three."]
"""Three tokens, one a chunk."""


def trace_of(guard_id: str, policy: Policy, *, tokens: int = 3, **receipt: Any) -> Trace:
    """A trace of `tokens` tokens whose receipt is clean unless told otherwise."""
    base = {"seen": 1, "scored": 1, "engine": "vllm-v1", "detector": "d1", "policy_hash": policy.hash}
    full = Receipt.model_validate({"guard_id": guard_id, "policy": policy.name, **base, **receipt})
    return Trace(
        guard_id=guard_id, created=1.0, model="m", tokenizer_hash="t", request="r", prompt_ids=[1],
        output_ids=list(range(tokens)), receipt=full,
        steps=[StepRecord(start=0, end=tokens, zone="reasoning", score=0.1, cue=False)],
    )  # fmt: skip


def probe_trace(guard_id: str, policy: Policy, runtime: GuardRuntime) -> Trace:
    """The trace of a probe under a policy, in which the first trigger was forced after one token."""
    trigger = runtime.triggers[0]
    forced = len(trigger.spaced)
    done = Intervention(step=0, at=1, trigger_id=trigger.id, score=1.0, forced=forced, completed=True)
    trace = trace_of(
        guard_id, policy.model_copy(update=PROBE_POLICY), interventions=[done], injected_tokens=forced,
        detector=runtime.detector.version,
    )  # fmt: skip
    return trace.model_copy(update={"output_ids": [9, *trigger.spaced]})


@dataclass
class ScriptedEngine:
    """What the engine does with the next request, and what it saw of the last."""

    spool: Path
    traces: Callable[[str], list[Trace]]
    """The traces written for a guard id when its generation ends."""
    words: list[str] = field(default_factory=lambda: list(WORDS))
    cut: Callable[[bytes], list[bytes]] | None = None
    """How a whole stream is cut into writes; None: each event is one."""
    tokens: int = len(WORDS)
    """How many it says that it generated."""
    status: int = 200
    stop_reason: str | None = None
    break_after: int | None = None
    """Cut the connection after so many chunks."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Unset: the second chunk (or the unary answer) waits for it."""
    body: dict[str, Any] = field(default_factory=dict)
    authorization: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    port: int = 0
    """Of the sidecar's connection."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    raw: bool = False
    """Whether it was asked to complete a raw prompt."""

    def app(self) -> Starlette:
        """The routes that the sidecar calls."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._chat, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "scripted", "root": "/m"}]})),
                Route("/health", lambda _: Response()),
            ]
        )

    async def _chat(self, request: Request) -> Response:
        self.body = await request.json()
        self.headers = dict(request.headers)
        self.port = request.scope["client"][1]
        self.raw = request.url.path == "/v1/completions"
        self.authorization = request.headers["authorization"]
        if self.status != 200:
            return JSONResponse({"error": {"message": "no such model", "code": self.status}}, self.status)
        if self.body.get("stream"):
            return StreamingResponse(self._writes(), media_type="text/event-stream")
        watcher = asyncio.create_task(self._watch(request))
        await self._held()
        watcher.cancel()
        self._write()
        message = (
            {"text": "".join(WORDS)} if self.raw else {"message": {"role": "assistant", "content": "".join(WORDS)}}
        )
        choice = {"index": 0, **message, "finish_reason": "stop", "stop_reason": self.stop_reason}
        kind = {"object": "text_completion"} if self.raw else {}
        return JSONResponse({"id": "c1", **kind, "choices": [choice], "usage": self._usage()})

    async def _writes(self) -> AsyncIterator[str | bytes]:
        if self.cut is None:
            async for event in self._events():
                yield event
            return
        for piece in self.cut("".join([event async for event in self._events()]).encode()):
            yield piece
            # The next one must not arrive in the same read.
            await asyncio.sleep(0.01)

    async def _events(self) -> AsyncIterator[str]:
        try:
            for n, word in enumerate(self.words):
                if n == self.break_after:
                    # What comes together with a connection's end is lost with it.
                    await asyncio.sleep(0.05)
                    raise RuntimeError("scripted break")
                if n == 1:
                    await self._held()
                last = n + 1 == len(self.words)
                said = {"text": word} if self.raw else {"delta": {"content": word}}
                choice = {"index": 0, **said, "finish_reason": "stop" if last else None}
                yield self._event(choices=[choice | ({"stop_reason": self.stop_reason} if last else {})])
            self._write()
            if self.body.get("stream_options", {}).get("include_usage"):
                yield self._event(choices=[], usage=self._usage())
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _held(self) -> None:
        while not self.hold.is_set():
            await asyncio.sleep(0.01)

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancelled.set()
        self.hold.set()

    def _write(self) -> None:
        for trace in self.traces(self.body.get("vllm_xargs", {}).get("guard_id", "")):
            Spool(self.spool).append(trace)

    def _event(self, **fields: Any) -> str:
        kind = "text_completion" if self.raw else "chat.completion.chunk"
        event = {"id": "c1", "object": kind, "created": 7, "model": "scripted", **fields}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": 1, "completion_tokens": self.tokens, "total_tokens": 1 + self.tokens}
