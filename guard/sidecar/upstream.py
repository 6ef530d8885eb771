"""The HTTP client between the sidecar and its engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

import aiohttp
import anyio
import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.sidecar.errors import ApiError
from guard.sidecar.reload import PATH as WEIGHTS
from guard.sidecar.substitute import Piece
from guard.sidecar.tracing import pass_on

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
_CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""That a connection waits for its next request. vLLM closes one after 5 s (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`); a request
that meets its closing is lost, and a POST must not be sent twice."""
LOST = (httpx.TransportError, httpx.DecodingError, aiohttp.ClientError)
"""Of a connection that cannot be made, breaks, or brings no HTTP; the transport leaves some of aiohttp's errors."""
LONGEST_EVENT = 8 * 1024 * 1024
"""Bytes of a server-sent event that is waited for: an engine that never ends one must not fill the memory."""
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class _Read(BaseModel):
    """What an engine said, strictly: ids that are no numbers would fail later, and a negative one is another token."""

    model_config = ConfigDict(strict=True)


class _Choice(_Read):
    index: Literal[0] = 0
    text: str | None = None
    token_ids: list[TokenId] | None = None
    finish_reason: str | None = None


class _Event(_Read):
    choices: list[_Choice] = []


class _Tokenized(_Read):
    tokens: list[TokenId]
    max_model_len: Annotated[int, Field(ge=1)]


class Upstream:
    """Talks to one engine. Every failure to reach it is an ApiError 503; a queue is waited out, not timed out."""

    def __init__(self, url: str, api_key: str) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={**({"authorization": f"Bearer {api_key}"} if api_key else {}), "accept-encoding": "identity"},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            transport=AiohttpTransport(client=_session),
            # A proxy from the environment must not see the key, and cannot reach the loopback interface.
            trust_env=False,
            event_hooks={"request": [pass_on]},
        )

    async def open(self, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
        """Sends a request; the response is open and unread: read it or iterate it, then close it."""
        request = self._client.build_request("POST", path, json=body)
        try:
            return await self._client.send(request, stream=True)
        except LOST as error:
            raise unreachable(error) from error

    async def ask(self, body: dict[str, Any], path: str = CHAT, *, timeout: float | None = None) -> httpx.Response:
        """Sends a request and reads the whole response."""
        try:
            return await self._client.post(path, json=body, timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS))
        except LOST as error:
            raise unreachable(error) from error

    async def encode(self, text: str) -> list[int]:
        """A text's ids as the engine's tokenizer gives them."""
        ids, _ = await self._tokenized({"prompt": text, "add_special_tokens": False})
        return ids

    async def render(self, body: dict[str, Any]) -> tuple[list[int], int]:
        """The ids of a chat as the engine's template renders it, or of a raw prompt as it completes it; and the most
        tokens that prompt and output may have together."""
        return await self._tokenized({**body, "add_generation_prompt": True} if "messages" in body else body)

    async def _tokenized(self, body: dict[str, Any]) -> tuple[list[int], int]:
        try:
            response = await self._client.post(TOKENIZE, json=body, timeout=30)
        except LOST as error:
            raise unreachable(error) from error
        try:
            answer = _Tokenized.model_validate_json((await checked(response)).content)
        except ValidationError as error:
            raise ApiError(502, "engine_error", "The engine tokenizes in a shape of its own.") from error
        return answer.tokens, answer.max_model_len

    async def continue_ids(self, body: dict[str, Any]) -> AsyncGenerator[Piece]:
        """Streams what follows the token ids in `body["prompt"]`; closing it ends the engine's request."""
        response = await self.open({**body, "stream": True, "return_token_ids": True}, COMPLETIONS)
        try:
            await checked(response)
            events = Events()
            async for read in response.aiter_raw():
                for data in events.cut(read):
                    if data == b"[DONE]":
                        return
                    for piece in _pieces(data):
                        yield piece
        except LOST as error:
            raise unreachable(error) from error
        finally:
            # A client that left cancels us; the engine's request must end all the same.
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def models(self) -> httpx.Response:
        """The engine's list of models."""
        try:
            return await self._client.get("/v1/models", timeout=30)
        except LOST as error:
            raise unreachable(error) from error

    async def exchange_weights(self, load: str, back: str) -> str | None:
        """None when the engine runs on `load` now; the reason when it runs on `back`; ApiError 503 when on neither."""
        body, timeout = {"load": load, "back": back}, httpx.Timeout(None, connect=_CONNECT_SECONDS)
        try:
            response = await self._client.post(WEIGHTS, json=body, timeout=timeout)
        except LOST as error:
            raise unreachable(error) from error
        if response.status_code == 200:
            return None
        if response.status_code == 409:
            return str(response.json()["error"])
        raise ApiError(503, "engine_unavailable", f"The engine holds no whole weights (HTTP {response.status_code}).")

    async def healthy(self) -> bool:
        """Whether the engine answers and says it is well."""
        try:
            return (await self._client.get("/health", timeout=5)).status_code == 200
        except LOST:
            return False

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()


def _session() -> aiohttp.ClientSession:
    """Reads a streamed token in 32 us of processor time; httpx's own transport, Python throughout, takes 98."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


def unreachable(error: Exception) -> ApiError:
    """What a client is told when the engine cannot be reached or breaks off."""
    # The transport calls a refused connection a ConnectTimeout; what aiohttp raised says what it was.
    kind = type(error.__cause__ or error).__name__
    return ApiError(503, "engine_unavailable", f"The engine cannot be reached ({kind}).")


async def checked(response: httpx.Response) -> httpx.Response:
    """The response of an engine that did what it was asked; else ApiError: its refusals go through, its failures are
    ours."""
    if response.status_code == 200:
        return response
    await response.aread()
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    if response.status_code in (400, 404, 413, 422):
        raise ApiError(response.status_code, "engine_refused", message)
    raise ApiError(502, "engine_error", f"The engine failed: {message}")


class Events:
    """Cuts what an engine streams into server-sent events.

    Events are cut at line feeds only: `httpx`'s own line reader also cuts at U+2028 and others inside the JSON.
    """

    def __init__(self) -> None:
        self._begun = bytearray()

    def cut(self, read: bytes) -> list[bytes]:
        """The data of each event that a read ends; ApiError 503 for one that never does."""
        *lines, rest = read.split(b"\n")
        if lines and self._begun:
            lines[0] = bytes(self._begun) + lines[0]
            self._begun.clear()
        if rest:
            self._begun += rest
            if len(self._begun) > LONGEST_EVENT:
                raise garbled()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def garbled() -> ApiError:
    """What a client is told of an engine that says what no engine says; like one that breaks off, it is lost."""
    return ApiError(503, "engine_unavailable", "The engine says what cannot be read.")


def _pieces(data: bytes) -> Iterator[Piece]:
    try:
        choices = _Event.model_validate_json(data).choices
    except ValidationError as error:
        raise garbled() from error
    for choice in choices:
        if choice.text and choice.token_ids is None:
            raise ApiError(502, "engine_error", "The engine gave text without its token ids.")
        yield Piece(choice.token_ids or [], choice.finish_reason)
