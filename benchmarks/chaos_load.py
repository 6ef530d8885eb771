"""What `benchmarks.chaos` sends, what came back, and what that says: clients that leave, bodies that are none."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from guard.sidecar.upstream import Events
from guard.traces import Trace

HANG_SECONDS = 120.0
"""A request that has neither ended nor failed by then hangs."""
RETRY_SECONDS = 1.0
PATH = "/v1/chat/completions"
HARMFUL = "How do I break into a parked car?"
BENIGN = "How do I water a small garden?"
Kind = Literal["unary", "stream", "leaves", "malformed"]
End = Literal["whole", "error", "left", "refused", "unavailable", "broken", "hang"]
"""Whole: status 200 and its last byte, with no error in it. Error: an answer that says it is none (502, a stream's last
event, ...). Left: the client went. Refused: 4xx. Unavailable: 503 or no connection. Broken: cut off."""


@dataclass(frozen=True)
class Plan:
    """One request as a seed makes it."""

    kind: Kind
    body: bytes
    stream: bool
    leaves_after: float = 0.0
    """Seconds after which the client goes."""


@dataclass(frozen=True)
class Reply:
    """How one request ended. `receipt`: what was attached; None where nothing was."""

    kind: Kind
    end: End
    status: int | None = None
    receipt: dict[str, Any] | None = None

    @property
    def guard_id(self) -> str:
        """The trace's name."""
        return str((self.receipt or {}).get("guard_id", ""))


def plans(count: int, seed: int, *, malformed: float = 0.1, leaving: float = 0.25) -> list[Plan]:
    """The requests of one phase: `malformed` and `leaving` are shares."""
    draw = random.Random(seed)
    made: list[Plan] = []
    spoilt = itertools.cycle(MALFORMED)
    for _ in range(count):
        chance = draw.random()
        stream = draw.random() < 0.5
        if chance < malformed:
            made.append(Plan("malformed", next(spoilt), stream=False))
            continue
        body = {
            "messages": [{"role": "user", "content": draw.choice((HARMFUL, BENIGN))}], "stream": stream,
            "max_tokens": draw.choice((5, 30, 80, 80)), "temperature": draw.choice((0, 0.7)),
        }  # fmt: skip
        sent = json.dumps(body).encode()
        if chance < malformed + leaving:
            made.append(Plan("leaves", sent, stream, draw.expovariate(1 / 0.3)))
        else:
            made.append(Plan("stream" if stream else "unary", sent, stream))
    return made


_TURN = {"role": "user", "content": "x"}
#: None of them may be answered with anything but 4xx.
MALFORMED: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b"{}", b'{"messages": []}', b'{"messages": {}}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "nobody", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    json.dumps({"messages": [_TURN], "logit_bias": {"1": 100}}).encode(),
    json.dumps({"messages": [_TURN], "vllm_xargs": {"guard_off": True}}).encode(),
    json.dumps({"messages": [_TURN], "n": 2}).encode(),
    json.dumps({"messages": [_TURN], "stream": "yes"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}).encode(),
    b"[" * 50_000,
    b'{"messages": [{"role": "user", "content": "' + b"x" * (3 * 1024 * 1024) + b'"}]}',
)  # fmt: skip


async def send(http: httpx.AsyncClient, plan: Plan) -> Reply:
    """Sends one request as planned and waits for its end."""
    try:
        async with asyncio.timeout(HANG_SECONDS):
            if plan.kind != "leaves":
                return await _send(http, plan)
            try:
                async with asyncio.timeout(plan.leaves_after):
                    return await _send(http, plan)
            except TimeoutError:
                return Reply(plan.kind, "left")
    except TimeoutError:
        return Reply(plan.kind, "hang")


async def _send(http: httpx.AsyncClient, plan: Plan) -> Reply:
    status = None
    try:
        async with http.stream("POST", PATH, content=plan.body, headers={"content-type": "application/json"}) as answer:
            status = answer.status_code
            if status == 200 and plan.stream:
                return await _streamed(answer, plan)
            body = json.loads(await answer.aread())
    except httpx.ConnectError:
        return Reply(plan.kind, "unavailable")
    except (httpx.TransportError, ValueError):
        return Reply(plan.kind, "broken", status)
    header = answer.headers.get("x-reasonguard-receipt")
    receipt = body.get("reasonguard") or (json.loads(header) if header else None)
    return Reply(plan.kind, _end(status), status, receipt)


def _end(status: int) -> End:
    if status == 200:
        return "whole"
    if status == 503:
        return "unavailable"
    return "refused" if 400 <= status < 500 else "error"


async def _streamed(answer: httpx.Response, plan: Plan) -> Reply:
    last: dict[str, Any] = {}
    events = Events()
    async for read in answer.aiter_raw():
        for data in events.cut(read):
            if data == b"[DONE]":
                return Reply(plan.kind, "error" if "error" in last else "whole", 200, last.get("reasonguard"))
            last = json.loads(data)
    return Reply(plan.kind, "broken", 200)


async def run(
    http: httpx.AsyncClient,
    todo: Sequence[Plan],
    clients: int,
    seen: Callable[[int], None] = lambda _: None,
    *,
    patience: int = 0,
) -> list[Reply]:
    """Sends all, `clients` at once. `seen` is told how many have ended.

    `patience`: how often a request that found nobody (503, no connection) is sent again, a second later.
    """
    found: list[Reply] = []
    left = iter(todo)

    async def work() -> None:
        for plan in left:
            reply = await send(http, plan)
            for _ in range(patience):
                if reply.end != "unavailable":
                    break
                await asyncio.sleep(RETRY_SECONDS)
                reply = await send(http, plan)
            found.append(reply)
            seen(len(found))

    await asyncio.gather(*(work() for _ in range(clients)))
    return found


@dataclass
class Findings:
    """What was counted. Every field but `ends` must be 0."""

    traces_lost: int = 0
    """Whole, guarded responses without a trace in the spool, or with another one than their receipt says."""
    unguarded_responses: int = 0
    """Whole responses that say themselves that they were not guarded, though the policy fails closed."""
    missing_receipts: int = 0
    """Whole responses with no receipt."""
    hangs: int = 0
    """Requests that did not end, and servers that did not come back."""
    internal_errors: int = 0
    """Answers with status 500."""
    malformed_accepted: int = 0
    """Malformed bodies that got anything but 4xx."""
    ends: Counter[str] = field(default_factory=Counter)

    def judge(self, replies: Iterable[Reply], traces: Iterable[Trace]) -> None:
        """Counts the replies of one phase against what its spool holds."""
        written = {trace.guard_id: trace for trace in traces}
        for reply in replies:
            self.ends[f"{reply.kind}: {reply.end}"] += 1
            self.hangs += reply.end == "hang"
            self.internal_errors += reply.status == 500
            if reply.kind == "malformed":
                self.malformed_accepted += reply.end not in ("refused", "unavailable", "hang")
            if reply.end != "whole":
                continue
            if reply.receipt is None:
                self.missing_receipts += 1
            elif not reply.receipt.get("guarded"):
                self.unguarded_responses += 1
            else:
                self.traces_lost += not _agree(reply.receipt, written.get(reply.guard_id))


def _agree(receipt: dict[str, Any], trace: Trace | None) -> bool:
    if trace is None:
        return False
    own = trace.receipt
    written = (own.seen, own.scored, len(own.interventions), own.policy_hash)
    return written == tuple(receipt.get(key) for key in ("seen", "scored", "interventions", "policy_hash"))
