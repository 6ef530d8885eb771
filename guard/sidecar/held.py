"""A request in mode `substitute`: the sidecar watches the tokens itself and answers in its own words."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from guard.monitor import StepMonitor
from guard.prompt import PromptReader
from guard.sidecar.context import Sidecar
from guard.sidecar.errors import ApiError
from guard.sidecar.firewall import Admitted
from guard.sidecar.proof import ID_HEADER, RECEIPT_HEADER, Delivered, Proof, prove, unproven
from guard.sidecar.scoring import Scorer
from guard.sidecar.speech import Speech
from guard.sidecar.substitute import Piece, Substitution
from guard.sidecar.tenants import Tenant
from guard.sidecar.wording import dumped
from guard.traces import Trace

ENGINE = "sidecar"
ALONE = "sidecar-only"
"""The same where the engine has no guard of its own (`serve --upstream`)."""
#: What a client may ask for that cannot be given from ids that were held back: the trigger is injected instead.
_INJECTED: dict[str, str] = {
    "stop": "stop strings are found by the engine, in text that may be taken back",
    "logprobs": "a trigger that the sidecar says itself has none",
    "top_logprobs": "a trigger that the sidecar says itself has none",
}
_NOT_SAMPLING = {"messages", "prompt", "max_tokens", "max_completion_tokens"}


def cannot_hold(body: dict[str, Any]) -> str | None:
    """Why a request is injected into although the policy says `substitute`; None when it can be held back."""
    return next((f"`{name}`: {why}" for name, why in _INJECTED.items() if body.get(name)), None)


class HeldExchange:
    """One request under way; `start` it, then let its text out."""

    def __init__(self, sidecar: Sidecar, admitted: Admitted, tenant: Tenant) -> None:
        self.sidecar, self.tenant, self.wants_usage = sidecar, tenant, admitted.wants_usage
        self.wording = admitted.wording
        self.guard_id = uuid.uuid4().hex
        self.headers = {ID_HEADER: self.guard_id}
        self._proof: Proof | None = None
        self._followed = sidecar.followed
        sidecar.holding.add(self)
        self._body, self._request = admitted.body, admitted.request
        self._sampling = {k: v for k, v in admitted.body.items() if k not in _NOT_SAMPLING}
        self._sampling |= tenant.salted(sidecar.secret)
        self._created = int(time.time())

    async def start(self) -> None:
        """Renders the prompt and reads the request; ApiError when the engine refuses it or is gone."""
        body, runtime = self._body, self.tenant.runtime
        asked: dict[str, Any] = {key: body[key] for key in ("model", "messages", "prompt") if key in body}
        try:
            self._engine = self.sidecar.take(self)
            with self._watched():
                self._prompt, longest = await self._engine.client.render(asked)
        except ApiError as error:
            self.sidecar.metrics.requests.labels("unavailable" if error.status == 503 else "engine_error").inc()
            raise
        limit = min(longest - len(self._prompt), body.get("max_completion_tokens") or body.get("max_tokens") or longest)
        if limit < 1:
            message = f"The prompt holds {len(self._prompt)} tokens, and the engine takes {longest} in all."
            raise ApiError(400, "engine_refused", message, param="messages" if "messages" in body else "prompt")
        # Special tokens are broken up in every message and refused in a raw prompt: marks are the template's own.
        reader = PromptReader(runtime.table, runtime.grammar, (), ())
        zones = reader.zones(self._prompt)
        self._speech = Speech(runtime.table, zones.copy())
        engine = ENGINE if self.sidecar.upstreams is None else ALONE
        monitor = StepMonitor(
            runtime, self._request, zones=zones, guard_id=self.guard_id, engine=engine, mode="substitute"
        )
        self._scorer = await Scorer.read(runtime, monitor, reader.messages(self._prompt))
        self._output = Substitution(monitor, self._prompt, limit, runtime.eos, self._go_on, self._scorer.score)

    async def unary(self) -> Response:
        """The whole response; ApiError 502 when it cannot be proven and the policy fails closed."""
        said = {"reasoning": "", "content": ""}
        try:
            async for field, text in self.text():
                said[field] += text
        except BaseException as error:
            await self.close(lost="unavailable" if isinstance(error, ApiError) else None)
            raise
        proof = await self.close()
        self.headers[RECEIPT_HEADER] = proof.attached.compact()
        if proof.broken and self.tenant.closed:
            raise unproven(proof)
        message = {"role": "assistant", "content": said["content"], "reasoning": said["reasoning"] or None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._output.finish}
        answer = {
            **self.head("chat.completion"), "choices": [choice], "usage": self.usage(),
            "reasonguard": proof.attached.model_dump(exclude_none=True),
        }  # fmt: skip
        return JSONResponse(self.wording.whole(answer), headers=self.headers)

    async def stream(self) -> Response:
        """The same, event by event."""
        return _HeldStream(self)

    async def text(self) -> AsyncIterator[tuple[str, str]]:
        """Field and text, as they are decided."""
        with self._watched():
            async for ids in self._output.released():
                for part in self._speech.say(ids):
                    yield part
        for part in self._speech.say((), last=True):
            yield part

    async def close(self, *, lost: str | None = None) -> Proof:
        """Writes the trace of what was let out, once; whatever happens to the client, it is kept.

        `lost`: the outcome that is counted for a response that did not reach its end.
        """
        if self._proof is not None:
            return self._proof
        with anyio.CancelScope(shield=True):
            self._proof = proof = await self._write()
        self.sidecar.holding.discard(self)
        self._engine.holding.discard(self)
        if self._output.finish is not None:
            self.sidecar.done(proof, self.tenant)
        elif lost is not None:
            self.sidecar.metrics.requests.labels(lost).inc()
        return proof

    async def _write(self) -> Proof:
        delivered, policy = Delivered(len(self._output.delivered)), self.tenant.policy
        trace = self._trace()
        try:
            await run_in_threadpool(self.sidecar.spool.append, trace.keeping(policy.log_content))
            kept: Trace | None = trace
        except OSError:
            kept = None
        return prove(
            self.guard_id, kept, delivered, policy, mode="substitute", followed=self._followed,
            upstream=self._engine.number or None,
        )  # fmt: skip

    def finish(self) -> str | None:
        """Why the output ended."""
        return self._output.finish

    def head(self, kind: str) -> dict[str, Any]:
        """What every event of a response begins with."""
        model = self._body.get("model") or self.sidecar.served_name
        return {"id": f"chatcmpl-{self.guard_id}", "object": kind, "created": self._created, "model": model}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of what was let out."""
        prompt, output = len(self._prompt), len(self._output.delivered)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """An engine that cannot be reached, or that breaks off, takes no more requests until it is proven again."""
        try:
            yield
        except ApiError as error:
            if error.status == 503:
                self._engine.reason = f"it failed under a request: {error.message}"
            raise

    async def _go_on(self, ids: list[int], most: int) -> AsyncGenerator[Piece]:
        body = {**self._sampling, "prompt": ids, "max_tokens": most, **self.sidecar.aside}
        again, began = len(ids) > len(self._prompt), time.perf_counter()
        async with contextlib.aclosing(self._engine.client.continue_ids(body)) as pieces:
            async for piece in pieces:
                if again:
                    self.sidecar.metrics.reentry.observe(time.perf_counter() - began)
                    again = False
                yield piece

    def _trace(self) -> Trace:
        monitor, tokenizer, served = self._output.monitor, self.tenant.runtime.tokenizer_hash, self.sidecar.serving
        return Trace(
            guard_id=self.guard_id, created=time.time(), model=served.model, weights=served.weights,
            tokenizer_hash=tokenizer,
            request=monitor.request, tenant=self.tenant.name, prompt_ids=self._prompt,
            output_ids=self._output.delivered, steps=monitor.steps, receipt=monitor.receipt,
            guard_time=self._scorer.time,
        )  # fmt: skip


class _HeldStream(StreamingResponse):
    """Server-sent events, the receipt last."""

    def __init__(self, exchange: HeldExchange) -> None:
        headers = {**exchange.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the stream; a client that leaves early still leaves its trace."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._exchange.close(lost="disconnected")

    async def _events(self) -> AsyncIterator[bytes]:
        exchange, failure = self._exchange, None
        for part in self._event({"role": "assistant", "content": ""}):
            yield part
        try:
            async for field, text in exchange.text():
                for part in self._event({field: text}):
                    yield part
            for part in self._event({}, exchange.finish()):
                yield part
        except ApiError as error:
            failure = error
        proof = await exchange.close(lost="unavailable")
        if failure is None and proof.broken and exchange.tenant.closed:
            failure = unproven(proof)
        last: dict[str, Any] = {
            **exchange.head("chat.completion.chunk"), "choices": [],
            "reasonguard": proof.attached.model_dump(exclude_none=True),
        }  # fmt: skip
        if exchange.wants_usage:
            last["usage"] = exchange.usage()
        for part in exchange.wording.last(last | (failure.body() if failure is not None else {})):
            yield part

    def _event(self, delta: dict[str, str], finish: str | None = None) -> Iterable[bytes]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        event = {**self._exchange.head("chat.completion.chunk"), "choices": [choice]}
        return self._exchange.wording.event(event, dumped(event))
