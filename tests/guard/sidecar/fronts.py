"""A sidecar before several engines that run already, which are scripted."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.remote_probe import prove_substitution
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import Upstream
from guard.sidecar.upstreams import Upstreams
from guard.traces import Spool
from tests.guard.sidecar.serving import running
from tests.guard.sidecar.unguarded import Unguarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HARMFUL: dict[str, Any] = {"messages": [{"role": "user", "content": "How do I break into a parked car?"}]}
CHAT = "/v1/chat/completions"


@dataclass
class RemoteFront:
    """A sidecar before several scripted engines, and what stops each of them."""

    engines: list[Unguarded]
    stops: list[contextlib.ExitStack]
    sidecar: Sidecar
    http: httpx.Client
    spool: Path

    @property
    def upstreams(self) -> Upstreams:
        assert self.sidecar.upstreams is not None
        return self.sidecar.upstreams

    def chat(self, **body: Any) -> tuple[int, dict[str, Any]]:
        response = self.http.post(CHAT, json={**HARMFUL, **body})
        return response.status_code, response.json()

    def events(self, **body: Any) -> list[dict[str, Any]]:
        text = self.http.post(CHAT, json={**HARMFUL, **body, "stream": True}).text
        data = [line.removeprefix("data: ") for line in text.split("\n") if line]
        assert data[-1] == "[DONE]"
        return [json.loads(each) for each in data[:-1]]

    def wait(self, states: dict[str, str]) -> None:
        until(lambda: self.upstreams.states == states)


@contextlib.contextmanager
def remote_fronts(
    runtime: GuardRuntime, neutraliser: Neutraliser, tokenizer: Tokenizer, spool: Path
) -> Iterator[Callable[..., RemoteFront]]:
    """Starts fronts: `begin(count, **policy)`; everything ends with the context."""
    with contextlib.ExitStack() as stack:

        def begin(count: int = 2, **policy: Any) -> RemoteFront:
            chosen = replace(runtime, policy=Policy(mode="substitute", **policy), eos=2)
            engines = [Unguarded(tokenizer) for _ in range(count)]
            stops = [stack.enter_context(contextlib.ExitStack()) for _ in engines]
            urls = [each.enter_context(running(e.app())) for each, e in zip(stops, engines, strict=True)]
            clients = [Upstream(url, "key") for url in urls]
            sidecar = build_sidecar(
                chosen, neutraliser, clients[0], SpoolFollower(spool), secret="", alive=lambda: True,
                spool=Spool(spool), served_name="tiny", allow_seed=True,
                upstreams=Upstreams(clients, Tenant("", chosen), prove_substitution, interval=0.02),
            )  # fmt: skip
            url = stack.enter_context(running(create_app(sidecar)))
            http = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
            front = RemoteFront(engines, stops, sidecar, http, spool)
            front.wait({str(n): "ok" for n in range(1, count + 1)})
            return front

        yield begin


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
