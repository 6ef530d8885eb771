"""`/v1/responses` where the engine's own guard injects: the same proof as chat, told in this route's words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.app import create_app
from guard.sidecar.context import build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.responses import ResponsesWording
from guard.sidecar.responses_fields import ResponsesRequest
from guard.sidecar.upstream import Upstream
from guard.traces import Spool, Trace
from tests.guard.sidecar.scripted import ScriptedEngine, trace_of
from tests.guard.sidecar.serving import running

Traces = Callable[[str, Policy], list[Trace]]
BODY: dict[str, Any] = {"model": "m", "input": "Hello", "temperature": 0}


@pytest.fixture
def start(
    runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path
) -> Iterator[Callable[..., tuple[httpx.Client, ScriptedEngine]]]:
    with contextlib.ExitStack() as stack:

        def begin(traces: Traces = lambda i, p: [trace_of(i, p)]) -> tuple[httpx.Client, ScriptedEngine]:
            engine = ScriptedEngine(tmp_path, lambda i: traces(i, Policy()))
            engine.hold.set()
            sidecar = build_sidecar(
                replace(runtime, policy=Policy()), neutraliser,
                Upstream(stack.enter_context(running(engine.app())), "key"), SpoolFollower(tmp_path), secret="s",
                alive=lambda: True, spool=Spool(tmp_path), served_name="scripted", allow_seed=True,
            )  # fmt: skip
            sidecar.probe.proven = True  # type: ignore[misc]
            sidecar.receipt_wait = 0.3
            url = stack.enter_context(running(create_app(sidecar)))
            return stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30)), engine

        yield begin


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each named as its data says."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    events = [json.loads(line.removeprefix("data: ")) for _, line in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    return events


def test_the_engine_is_asked_for_a_chat_and_the_receipt_comes_along(start: Any) -> None:
    http, engine = start()
    response = http.post("/v1/responses", json=BODY)
    answer = response.json()
    assert engine.body["messages"] == [{"role": "user", "content": "Hello"}]
    assert engine.body["vllm_xargs"]["guard_id"] == answer["reasonguard"]["guard_id"]
    assert json.loads(response.headers["x-reasonguard-receipt"]) == answer["reasonguard"]
    assert (answer["status"], answer["model"], answer["reasonguard"]["guarded"]) == ("completed", "m", True)
    (message,) = answer["output"]
    assert message["content"][0]["text"] == "One two three."
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (1, 3)


def test_a_stream_ends_with_the_receipt(start: Any) -> None:
    http, engine = start()
    events = events_of(http.post("/v1/responses", json={**BODY, "stream": True}).text)
    assert engine.body["stream_options"] == {"include_usage": True}
    assert [event["delta"] for event in events if event["type"].endswith(".delta")] == ["One", " two", " three."]
    last = events[-1]
    assert (last["type"], last["response"]["reasonguard"]["guarded"]) == ("response.completed", True)
    assert last["response"]["usage"]["output_tokens"] == 3
    assert (last["response"]["model"], events[0]["response"]["output"]) == ("scripted", [])


def test_what_is_not_proven_is_withheld_or_ends_as_failed(start: Any) -> None:
    http, _ = start(lambda i, p: [trace_of(i, p, scored=0, unscored=1)])
    response = http.post("/v1/responses", json=BODY)
    message = "The response could not be proven guarded: 1 of 1 steps were not scored."
    assert (response.status_code, response.json()["error"]["message"]) == (502, message)
    last = events_of(http.post("/v1/responses", json={**BODY, "stream": True}).text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": message}
    assert last["response"]["reasonguard"]["guarded"] is False


def test_an_engine_that_breaks_off_ends_as_failed_before_and_after_the_first_word(start: Any) -> None:
    http, engine = start()
    for after, kinds in ((0, 2), (1, 8)):
        engine.break_after = after
        events = events_of(http.post("/v1/responses", json={**BODY, "stream": True}).text)
        assert (events[-1]["type"], len(events) - 1) == ("response.failed", kinds)
    engine.status = 400
    refused = http.post("/v1/responses", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")


def test_reasoning_that_comes_back_is_an_item_of_its_own() -> None:
    wording = ResponsesWording(ResponsesRequest(input="x"))
    for delta in ({"reasoning": "a"}, {"reasoning": "b"}, {"content": "c"}, {"reasoning": "d"}):
        list(wording.event({"model": "m", "choices": [{"delta": delta}]}, b""))
    last = b"".join(wording.last({"choices": [], "reasonguard": {"guarded": True}}))
    output = events_of(last.decode())[-1]["response"]["output"]
    assert [(item["type"], item["content"][0]["text"]) for item in output] == [
        ("reasoning", "ab"), ("message", "c"), ("reasoning", "d"),
    ]  # fmt: skip
