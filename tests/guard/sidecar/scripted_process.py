"""A scripted engine as a process of its own, which can be killed: it passes the probe and says three words otherwise.

python -m tests.guard.sidecar.scripted_process --port PORT SPOOL POLICY DETECTOR TRIGGER_ID IDS_AS_JSON

`POLICY`: a policy file, or `-`; `DETECTOR`: the version that its probes name. Unlike `ScriptedEngine` it
answers many requests at once, and counts them as vLLM does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from guard.engine.session import PROBE_POLICY
from guard.policy import Policy, load_policy
from guard.traces import Intervention, Spool
from tests.guard.sidecar.scripted import WORDS, trace_of

_PAUSE = 0.02


@dataclass
class Process:
    """One engine; `trigger` and `ids` are what it forces in a probe."""

    spool: Path
    policy: Policy
    detector: str
    trigger: str
    ids: list[int]
    running: int = 0

    def app(self) -> Starlette:
        """The routes that the sidecar and the chaos rig call."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [{"id": "scripted"}]})),
                Route("/health", lambda _: Response()),
                Route("/metrics", self._metrics),
            ]
        )

    async def _metrics(self, _: Request) -> Response:
        lines = (f'vllm:num_requests_running{{engine="0"}} {self.running}', 'vllm:num_requests_waiting{engine="0"} 0')
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        self.running += 1
        try:
            await asyncio.sleep(_PAUSE)
            usage = self._written(body["vllm_xargs"])
        finally:
            self.running -= 1
        message = {"role": "assistant", "content": "".join(WORDS)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None}
        return JSONResponse({"id": "c1", "choices": [choice], "usage": usage})

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        try:
            for word in WORDS:
                yield _event(choices=[{"index": 0, "delta": {"content": word}, "finish_reason": None}])
                await asyncio.sleep(_PAUSE)
            yield _event(choices=[], usage=self._written(body["vllm_xargs"]))
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1

    def _written(self, asked: dict[str, str]) -> dict[str, int]:
        """Writes the trace; a disk that is full loses it, as the engine's guard does. Returns the usage."""
        trace = trace_of(asked["guard_id"], self.policy)
        if "guard_probe" in asked:
            forced = len(self.ids)
            done = Intervention(
                step=0, at=1, trigger_id=self.trigger, score=1.0, forced=forced, completed=True
            )  # fmt: skip
            probed = self.policy.model_copy(update=PROBE_POLICY)
            trace = trace_of(
                asked["guard_id"], probed, detector=self.detector, interventions=[done], injected_tokens=forced
            )
            trace = trace.model_copy(update={"output_ids": [9, *self.ids, 9]})
        with contextlib.suppress(OSError):
            Spool(self.spool).append(trace)
        return {"prompt_tokens": 1, "completion_tokens": trace.output_tokens, "total_tokens": 1 + trace.output_tokens}


def _event(**fields: Any) -> str:
    return f"data: {json.dumps({'id': 'c1', 'object': 'chat.completion.chunk', 'created': 7, **fields})}\n\n"


if __name__ == "__main__":
    _, _, port, spool, policy, detector, trigger, ids = sys.argv
    chosen = load_policy(None if policy == "-" else Path(policy))
    uvicorn.run(
        Process(Path(spool), chosen, detector, trigger, json.loads(ids)).app(), port=int(port), log_level="warning"
    )
