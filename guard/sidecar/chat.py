"""`/v1/chat/completions` and the routes that become one: from an admitted request to a response with its receipt."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import anyio
import httpx
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from guard.sidecar.context import Sidecar
from guard.sidecar.errors import ApiError, Refused
from guard.sidecar.firewall import Admitted
from guard.sidecar.held import HeldExchange, cannot_hold
from guard.sidecar.proof import ID_HEADER, RECEIPT_HEADER, Delivered, Proof, prove, unproven
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import CHAT, COMPLETIONS, LOST, Events, checked, garbled, unreachable

T = TypeVar("T")
#: Bytes of a body that is checked in 0.2 ms (at worst 7); beside a busy engine the way to a thread and back takes 4.
_SMALL = 4 * 1024
_ENDING = 1.0
"""Seconds that an engine gets to end a stream whose last event it has sent."""
#: Why `/v1/completions` is 404.
OFF = "/v1/completions is off: ask /v1/chat/completions, or start `serve` with --completions."


class _Gone(Exception):
    """The client has left."""


async def chat(request: Request) -> Response:
    """One guarded chat completion, streamed or not."""
    return await _guarded(request, request.app.state.sidecar.firewall.admit)


async def responses(request: Request) -> Response:
    """One guarded response, streamed or not: a chat completion in other words."""
    return await _guarded(request, request.app.state.sidecar.firewall.admit_response)


async def completions(request: Request) -> Response:
    """One guarded completion of a raw prompt, streamed or not; 404 unless the operator has turned the route on."""
    sidecar: Sidecar = request.app.state.sidecar
    if not sidecar.completions:
        sidecar.metrics.requests.labels("refused").inc()
        return ApiError(404, "not_found", OFF).response()
    request.state.tenant = request.state.tenant.watching_all
    return await _guarded(request, sidecar.firewall.admit_completion)


async def _guarded(request: Request, admit: Callable[[bytes], Admitted]) -> Response:
    sidecar: Sidecar = request.app.state.sidecar
    try:
        body = await request.body()
        admitted = admit(body) if len(body) <= _SMALL else await run_in_threadpool(admit, body)
        # `Limited` ends a stream in it that takes too long.
        request.state.wording = admitted.wording
        tenant: Tenant = request.state.tenant
        await sidecar.enter(tenant)
        exchange = _exchange(sidecar, admitted, tenant)
    except ApiError as error:
        sidecar.metrics.requests.labels("refused" if isinstance(error, Refused) else "unavailable").inc()
        return error.response()
    try:
        return await _until_gone(request, _answer(exchange, stream=admitted.stream))
    except _Gone:
        sidecar.metrics.requests.labels("disconnected").inc()
        return Response(status_code=499)
    except ApiError as error:
        return error.response(exchange.headers)


def _exchange(sidecar: Sidecar, admitted: Admitted, tenant: Tenant) -> Exchange | HeldExchange:
    if tenant.policy.mode == "inject" and sidecar.upstreams is None:
        return Exchange(sidecar, admitted, tenant)
    _check_model(sidecar, admitted.body.get("model"))
    reason = cannot_hold(admitted.body)
    if reason is None:
        return HeldExchange(sidecar, admitted, tenant)
    if sidecar.upstreams is not None:
        raise Refused(f"{reason}, and the engine has no guard of its own that could inject instead.")
    return Exchange(sidecar, admitted, tenant, fallback=reason)


def _check_model(sidecar: Sidecar, asked: str | None) -> None:
    """Refused for a model that shares only the address with the one that was proven: another tokenizer, other marks."""
    if sidecar.models is not None and asked and asked not in sidecar.models:
        raise Refused(
            f"The model `{asked[:64]}` is not served here: only {', '.join(sorted(sidecar.models))}.",
            param="model", code="model_not_found", status=404,
        )  # fmt: skip


async def _answer(exchange: Exchange | HeldExchange, *, stream: bool) -> Response:
    await exchange.start()
    return await (exchange.stream() if stream else exchange.unary())


class Exchange:
    """One request under way: its guard id and what becomes of it."""

    def __init__(self, sidecar: Sidecar, admitted: Admitted, tenant: Tenant, *, fallback: str | None = None) -> None:
        self.sidecar, self.tenant, self._fallback = sidecar, tenant, fallback
        self.wants_usage, self.wording = admitted.wants_usage, admitted.wording
        self.guard_id = uuid.uuid4().hex
        self.headers = {ID_HEADER: self.guard_id}
        self._followed = sidecar.followed
        told = {"guard_id": self.guard_id, **tenant.named(sidecar.secret)}
        self._body = {**admitted.body, **tenant.salted(sidecar.secret), "vllm_xargs": told}
        self._path = COMPLETIONS if admitted.raw else CHAT
        # Only a chat is taken apart.
        if sidecar.keep_special and not admitted.raw:
            self._body["skip_special_tokens"] = False

    async def start(self) -> None:
        """Nothing has to be known before the engine is asked."""

    async def unary(self) -> Response:
        """The whole response with its receipt; ApiError 502 when it cannot be proven and the policy fails closed."""
        self.sidecar.follower.expect(self.guard_id)
        try:
            response = await self._sent(self.sidecar.upstream.ask(self._body, self._path))
            answer = response.json()
            choice = answer["choices"][0]
            tokens = (answer.get("usage") or {}).get("completion_tokens")
            proof = await self.prove(Delivered(tokens, isinstance(choice.get("stop_reason"), str)))
        finally:
            self.sidecar.follower.forget(self.guard_id)
        self.headers[RECEIPT_HEADER] = proof.attached.compact()
        if proof.broken and self.tenant.closed:
            raise unproven(proof)
        answer["reasonguard"] = proof.attached.model_dump(exclude_none=True)
        return JSONResponse(self.wording.whole(answer), headers=self.headers)

    async def stream(self) -> Response:
        """Opens the stream; nothing of it is read yet."""
        body = {**self._body, "stream": True, "stream_options": {"include_usage": True}}
        self.sidecar.follower.expect(self.guard_id)
        try:
            response = await self._sent(self.sidecar.upstream.open(body, self._path))
        except BaseException:
            self.sidecar.follower.forget(self.guard_id)
            raise
        return GuardedStream(self, response)

    async def prove(self, delivered: Delivered, *, wait: bool = True) -> Proof:
        """Waits for the trace and judges the response by it."""
        began = time.perf_counter()
        timeout = self.sidecar.receipt_wait if wait else 0.0
        trace = await self.sidecar.follower.wait(self.guard_id, delivered.covered_by, timeout)
        self.sidecar.metrics.receipt_wait.observe(time.perf_counter() - began)
        policy = self.tenant.policy
        proof = prove(self.guard_id, trace, delivered, policy, fallback=self._fallback, followed=self._followed)
        self.sidecar.done(proof, self.tenant)
        return proof

    async def _sent(self, sending: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        """The engine's answer; what is no answer becomes an ApiError and is counted."""
        try:
            response = await sending
        except ApiError:
            self.sidecar.metrics.requests.labels("unavailable").inc()
            raise
        try:
            return await checked(response)
        except ApiError:
            self.sidecar.metrics.requests.labels("engine_error").inc()
            raise


class GuardedStream(StreamingResponse):
    """Passes events on as they come, and ends with the receipt."""

    def __init__(self, exchange: Exchange, upstream: httpx.Response) -> None:
        headers = {**exchange.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")
        self._exchange, self._upstream = exchange, upstream
        self._cutter, self._over = Events(), False
        self._failure: ApiError | None = ApiError(503, "engine_unavailable", "The engine broke off.")
        """Why the stream ended early; None once it has ended well."""
        self._tokens: int | None = None
        self._cut_at_text = False
        self._last: dict[str, Any] = {}
        self._counted = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the stream; however it ends, the engine's side of it is closed."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()
            self._exchange.sidecar.follower.forget(self._exchange.guard_id)
            if not self._counted:
                self._exchange.sidecar.metrics.requests.labels("disconnected").inc()

    async def _events(self) -> AsyncIterator[bytes]:
        """What one read has brought goes on in one write."""
        reads = self._upstream.aiter_raw()
        try:
            async for read in reads:
                if said := self._said(read):
                    yield said
                if self._over:
                    break
        except LOST as error:
            self._failure = unreachable(error)
        except ApiError as error:
            self._failure = error
        finished = self._failure is None
        proof = await self._exchange.prove(Delivered(self._tokens, self._cut_at_text), wait=finished)
        self._counted = True
        yield b"".join(self._exchange.wording.last(self._last_event(proof, self._failure)))
        if finished:
            await _to_its_end(reads)

    def _said(self, read: bytes) -> bytes:
        """The route's words for the events that a read has ended, up to the stream's last."""
        said: list[bytes] = []
        for data in self._cutter.cut(read):
            if data == b"[DONE]":
                self._over, self._failure = True, None
                break
            event = _parsed(data)
            if event is None:
                self._over, self._failure = True, garbled()
                break
            if self._note(event):
                said += self._exchange.wording.event(event, data)
        return b"".join(said)

    def _note(self, event: dict[str, Any]) -> bool:
        """Remembers what the receipt needs; False for the usage chunk that only we asked for."""
        self._last = event
        usage = event.get("usage")
        if usage:
            self._tokens = usage.get("completion_tokens")
        choices = event.get("choices")
        if choices and isinstance(choices[0].get("stop_reason"), str):
            self._cut_at_text = True
        return bool(choices) or "error" in event or self._exchange.wants_usage

    def _last_event(self, proof: Proof, failure: ApiError | None) -> dict[str, Any]:
        head: dict[str, Any] = {key: self._last[key] for key in ("id", "created", "model") if key in self._last}
        event: dict[str, Any] = {
            **head,
            "object": "chat.completion.chunk",
            "choices": [],
            "reasonguard": proof.attached.model_dump(exclude_none=True),
        }
        if failure is None and proof.broken and self._exchange.tenant.closed:
            failure = unproven(proof)
        if failure is not None:
            event |= failure.body()
        return event


def _parsed(data: bytes) -> dict[str, Any] | None:
    """An event; None where there is none."""
    try:
        # 1.1 us for a chunk; `json.loads` takes 3.7.
        event = from_json(data)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


async def _to_its_end(reads: AsyncIterator[bytes]) -> None:
    """Only a connection whose response was read to its end can be used again."""
    with contextlib.suppress(TimeoutError, ApiError, *LOST):
        async with asyncio.timeout(_ENDING):
            async for _ in reads:
                pass


async def _until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and with it the engine's request) when the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
