"""Generation through any number of vLLM servers (`/v1/completions`), token ids in and out, resumable.

Every prompt goes out as ids and comes back beside the result, so that a server that adds a BOS or cuts a prompt is
found out. Sampling parameters are sent in full: a server would otherwise fill them in from its model's generation
config, and its continuations would differ from those of `align.generate`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.console import Console
from rich.progress import Progress

from align.generate import Job, Result, answers, end_torn_line
from align.sites import Site, Sites
from guard.errors import UserError

KEY_VARIABLE = "REASONGUARD_ENDPOINT_KEY"
"""Environment variable with the servers' API key; a key on the command line would be in every process list."""
PROBE = "Wait — does 1 + 1 make 2?\n\nI'd say so: <tag> äöü 漢字."
"""Must become the same ids on the server as here."""
Answer = TypeVar("Answer", bound=BaseModel)
_CONNECT_SECONDS = 5.0
_RETRIED = frozenset([408, 409, 425, 429])


class EndpointSpec(BaseModel):
    """Which servers, and how hard they are driven."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = Field(min_length=1)
    """Base addresses, with or without `/v1`."""
    concurrency: int = Field(default=32, ge=1)
    """Requests in flight per server."""
    attempts: int = Field(default=8, ge=1)
    """How often one job is tried, over all servers."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one continuation may take."""
    backoff: float = Field(default=0.5, gt=0)
    """Seconds that a server rests after a failure; doubled with each in a row, up to 30."""


class EndpointGenerator:
    """A `Backend` over vLLM servers that serve one model, whose tokenizer is `encode` (no special tokens added)."""

    def __init__(self, spec: EndpointSpec, encode: Callable[[str], list[int]]) -> None:
        self._spec = spec
        self._encode = encode
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._urls = [_base(url) for url in dict.fromkeys(spec.urls)]
        self._cards: dict[str, _Card] = {}

    @property
    def context(self) -> int:
        """Tokens that a prompt and its continuation may have together: the smallest of the servers'."""
        return min(card.max_model_len for card in self._meet().values())

    def generate(self, jobs: Sequence[Job], out: Path, what: str) -> dict[str, Result]:
        """Results of all jobs by id, asking only for those that `out` does not hold yet. Shows progress named `what`.

        UserError when a server refuses a job or a job has failed too often: what is whole by then is in `out`.
        """
        if any(job.guard for job in jobs):
            raise ValueError("an endpoint's guard is its own: a job cannot ask for one")
        done = answers(out, jobs)
        missing = [job for job in jobs if job.id not in done]
        if missing:
            self._meet()
            out.parent.mkdir(parents=True, exist_ok=True)
            end_torn_line(out)
            asyncio.run(self._all(missing, out, what))
            done = answers(out, jobs)
        return done

    def _meet(self) -> dict[str, _Card]:
        """What each server says of itself; those that are down are told and left out. UserError when all are, or when
        one has another tokenizer."""
        if not self._cards:
            cards: dict[str, _Card] = {}
            down: list[_Down] = []
            with self._client(httpx.Client) as client:
                for url in self._urls:
                    try:
                        cards[url] = _meet(client, url, self._encode(PROBE))
                    except _Down as problem:
                        down.append(problem)
            if not cards:
                raise down[0]
            for each in down:
                Console(stderr=True).print(f"{each} It is left out.", highlight=False, markup=False)
            self._cards = cards
        return self._cards

    def _client(self, kind: Callable[..., Any]) -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self._spec.timeout, connect=_CONNECT_SECONDS, pool=None)
        # A proxy from the environment must not see the key.
        return kind(headers=self._headers, timeout=timeout, limits=limits, trust_env=False)

    async def _all(self, jobs: Sequence[Job], out: Path, what: str) -> None:
        sites = Sites(list(self._cards), self._spec.concurrency, self._spec.backoff)
        waiting = iter(jobs)
        workers = min(len(jobs), self._spec.concurrency * len(self._cards))
        with Progress(console=Console(stderr=True)) as bar, out.open("a", encoding="utf-8") as sink:
            task = bar.add_task(what, total=len(jobs))

            async def work(client: httpx.AsyncClient) -> None:
                for job in waiting:
                    result = await self._one(client, sites, job, what)
                    sink.write(result.model_dump_json() + "\n")
                    sink.flush()
                    bar.advance(task)

            try:
                async with self._client(httpx.AsyncClient) as client, asyncio.TaskGroup() as group:
                    for _ in range(workers):
                        group.create_task(work(client))
            except BaseExceptionGroup as group_error:
                # The first that failed has cancelled the others.
                raise group_error.exceptions[0] from None

    async def _one(self, client: httpx.AsyncClient, sites: Sites, job: Job, what: str) -> Result:
        problem = ""
        for _ in range(self._spec.attempts):
            async with sites.lease() as site:
                found = await self._ask(client, site, job)
            if isinstance(found, Result):
                return found
            problem = f"{site.url}: {found}"
        raise UserError(
            f"Generation ({what}) gave up on a job after {self._spec.attempts} attempts",
            got=problem,
            fix="Look at the servers; run the same command again to go on",
        )

    async def _ask(self, client: httpx.AsyncClient, site: Site, job: Job) -> Result | str:
        """The result, or what went wrong that may go right another time."""
        try:
            response = await client.post(f"{site.url}/v1/completions", json=self._body(job, site.url))
        except httpx.TransportError as error:
            return site.failed(type(error).__name__)
        if response.status_code >= 500 or response.status_code in _RETRIED:
            return site.failed(f"HTTP {response.status_code}", response.headers.get("retry-after"))
        if response.status_code != 200:
            raise UserError(
                f"Endpoint {site.url} refuses a job with HTTP {response.status_code}",
                got=response.text[:300],
                fix=f"Its key belongs into {KEY_VARIABLE}" if response.status_code in (401, 403) else None,
            )
        try:
            choice = _Completion.model_validate_json(response.content).choices[0]
        except (ValidationError, IndexError):
            return site.failed("no completion")
        if choice.token_ids is None or choice.prompt_token_ids != job.prompt_ids:
            raise UserError(
                f"Endpoint {site.url} does not answer in the token ids it was asked in",
                wanted="a vLLM server that knows `return_token_ids` and changes no prompt",
            )
        if choice.finish_reason not in ("stop", "length"):
            return site.failed(f"finish reason {choice.finish_reason}")
        site.recovered()
        return Result(id=job.id, job=job.key, output_ids=choice.token_ids, finish=choice.finish_reason)

    def _body(self, job: Job, url: str) -> dict[str, Any]:
        return {
            "model": self._cards[url].id, "prompt": job.prompt_ids, "max_tokens": job.max_tokens,
            "temperature": job.temperature, "top_k": job.top_k, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "return_token_ids": True,
        }  # fmt: skip


class _Choice(BaseModel):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class _Card(BaseModel):
    id: str
    max_model_len: int


class _Listed(BaseModel):
    data: list[_Card] = Field(min_length=1)

    @field_validator("data", mode="before")
    @classmethod
    def _base_model(cls, data: Any) -> Any:
        # Adapters are listed after their base model, without a length.
        return data[:1] if isinstance(data, list) else data


class _Tokens(BaseModel):
    tokens: list[int]


class _Down(UserError):
    """A server that is not there now, but may be another time."""


def _meet(client: httpx.Client, url: str, wanted: list[int]) -> _Card:
    """The model that a server lists first (its base model); UserError unless its tokenizer is ours."""
    card = _say(client.get, f"{url}/v1/models", _Listed).data[0]
    body = {"model": card.id, "prompt": PROBE, "add_special_tokens": False}
    if _say(client.post, f"{url}/tokenize", _Tokens, json=body).tokens != wanted:
        raise UserError(
            f"Endpoint {url} serves {card.id}, which has another tokenizer", fix="Serve the model that --model names"
        )
    return card


def _say(send: Callable[..., httpx.Response], url: str, shape: type[Answer], **more: Any) -> Answer:
    try:
        response = send(url, **more)
        response.raise_for_status()
        return shape.model_validate_json(response.content)
    except httpx.HTTPError as error:
        refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
        kind = UserError if refused else _Down
        raise kind(f"Endpoint {url} does not answer", got=str(error) or type(error).__name__) from error
    except ValidationError as error:
        raise UserError(f"Endpoint {url} does not answer as vLLM does", got=response.text[:200]) from error


def _base(url: str) -> str:
    parsed = httpx.URL(url) if url.startswith(("http://", "https://")) else None
    if parsed is None or not parsed.host:
        raise UserError("--endpoint is no address", got=url, wanted="http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")
