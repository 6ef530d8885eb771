"""What is refused and cut when too much is under way, when it takes too long, and while a server stops."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from guard.sidecar import limits
from guard.sidecar.limits import Limits
from guard.sidecar.metrics import Metrics
from guard.sidecar.server import Server
from tests.guard.sidecar import test_sidecar
from tests.guard.sidecar.test_responses import events_of
from tests.guard.sidecar.test_sidecar import HELLO, Front, Start

start = test_sidecar.start


def limited(start: Start, **given: Any) -> Front:
    """A front whose engine holds its answers back."""
    front = start()
    front.sidecar.limits = Limits(front.sidecar.metrics, **given)
    front.engine.hold.clear()
    return front


def ask(front: Front, **body: Any) -> httpx.Response:
    return front.http.post("/v1/chat/completions", json={**HELLO, **body})


def turned_away(front: Front) -> dict[str, float]:
    family = next(f for f in front.sidecar.metrics.registry.collect() if f.name == "reasonguard_turned_away")
    return {s.labels["limit"]: s.value for s in family.samples if s.name.endswith("_total")}


@pytest.mark.parametrize("stream", [True, False])
def test_one_request_too_many_is_refused_at_once(start: Start, stream: bool) -> None:
    front = limited(start, streams=1)
    found: list[httpx.Response] = []
    first = threading.Thread(target=lambda: found.append(ask(front, stream=stream)))
    first.start()
    _until(lambda: front.sidecar.limits.under_way == 1)
    second = ask(front, stream=stream)
    assert (second.status_code, second.headers["retry-after"]) == (503, "1")
    assert second.json()["error"] == {
        "message": "1 requests are under way, as many as are taken at once.", "type": "server_error",
        "param": None, "code": "overloaded",
    }  # fmt: skip
    front.engine.hold.set()
    first.join()
    assert [response.status_code for response in found] == [200]
    _until(lambda: front.sidecar.limits.under_way == 0)
    assert ask(front, stream=stream).status_code == 200
    assert turned_away(front) == {"streams": 1}


def test_a_unary_request_that_takes_too_long_is_504_and_ends_the_engines_part(start: Start) -> None:
    front = limited(start, seconds=0.2)
    response = ask(front)
    message = "The request took longer than 0.2 s."
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert response.json()["error"]["message"] == message
    assert front.engine.cancelled.wait(5)
    _until(lambda: (front.sidecar.limits.under_way, front.sidecar.follower.held) == (0, 0))
    assert turned_away(front) == {"time": 1}


def test_a_stream_that_takes_too_long_ends_unguarded_with_the_reason(start: Start) -> None:
    front = limited(start, seconds=0.3)
    response = ask(front, stream=True)
    first, last, done = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert (json.loads(first)["choices"][0]["delta"]["content"], done) == ("One", "[DONE]")
    message = "The request took longer than 0.3 s."
    assert json.loads(last) == {
        "object": "chat.completion.chunk", "choices": [],
        "reasonguard": {
            "guard_id": response.headers["x-reasonguard-id"], "guarded": False, "reason": message, "zones": [],
            "seen": 0, "scored": 0, "unscored": 0, "unreadable": 0, "interventions": 0, "unanswered": 0,
            "injected_tokens": 0, "replaced_tokens": 0, "mode": "inject", "policy": "default",
            "policy_hash": front.policy.hash, "shadow": False,
        },
        "error": {"message": message, "type": "server_error", "param": None, "code": "request_timeout"},
    }  # fmt: skip
    assert front.engine.cancelled.wait(5)
    _until(lambda: front.sidecar.follower.held == 0)


def test_a_response_that_takes_too_long_ends_as_failed(start: Start) -> None:
    front = limited(start, seconds=0.3)
    response = front.http.post("/v1/responses", json={"input": "Hello", "stream": True})
    *_, delta, done, part, item, last = events = events_of(response.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (delta["delta"], done["text"], part["part"]["text"], item["item"]["status"]) == (
        "One",
        "One",
        "One",
        "completed",
    )
    message = "The request took longer than 0.3 s."
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": message}
    assert last["response"]["output"] == [item["item"]]
    receipt = last["response"]["reasonguard"]
    assert (receipt["guard_id"], receipt["guarded"], receipt["reason"]) == (
        response.headers["x-reasonguard-id"], False, message,
    )  # fmt: skip
    assert "[DONE]" not in response.text
    assert front.engine.cancelled.wait(5)


def test_a_completion_that_takes_too_long_ends_in_its_own_shape(start: Start) -> None:
    front = limited(start, seconds=0.3)
    front.sidecar.completions = True
    response = front.http.post("/v1/completions", json={"prompt": "Once", "stream": True})
    first, last, done = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert (json.loads(first)["choices"][0]["text"], done) == ("One", "[DONE]")
    found = json.loads(last)
    assert (found["object"], found["choices"], found["error"]["code"]) == ("text_completion", [], "request_timeout")
    watched = front.policy.model_copy(update={"zones": ("reasoning", "answer")})
    assert (found["reasonguard"]["guarded"], found["reasonguard"]["policy_hash"]) == (False, watched.hash)


@contextlib.contextmanager
def unfinished(front: Front, path: str = "/v1/chat/completions", sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has promised a body of 100 bytes, and has sent so much of it."""
    with socket.create_connection((front.http.base_url.host, front.http.base_url.port or 0), timeout=20) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n".encode() + sent)
        yield client


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
def test_a_body_that_does_not_come_takes_no_place_and_is_waited_for_so_long(start: Start, path: str) -> None:
    front = limited(start, streams=1, body_seconds=1)
    front.engine.hold.set()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(unfinished(front, path, b"{")) for _ in range(3)]
        _until(lambda: front.sidecar.limits._waiting == 3)
        assert ask(front).status_code == 200
        for client in clients:
            # To the end: the server closes.
            head, body = b"".join(iter(partial(client.recv, 4096), b"")).split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert json.loads(body)["error"] == {
                "message": "The body took longer than 1 s.", "type": "invalid_request_error", "param": None,
                "code": "body_timeout",
            }  # fmt: skip
    assert turned_away(front) == {"body": 3}
    assert front.sidecar.limits._waiting == 0


def test_bodies_that_are_waited_for_hold_only_so_much_together(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_WAITING", 200)
    front = limited(start)
    front.engine.hold.set()
    with unfinished(front, sent=b"x" * 99), unfinished(front, sent=b"x" * 99):
        _until(lambda: front.sidecar.limits._waiting == 198)
        refused = ask(front)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"] == "Too many bodies are on their way."
    _until(lambda: front.sidecar.limits._waiting == 0)
    assert ask(front).status_code == 200


def test_a_draining_server_is_not_ready_takes_nothing_and_finishes_what_it_has(start: Start) -> None:
    front = limited(start)
    found: list[dict[str, Any]] = []
    under_way = threading.Thread(target=lambda: found.append(front.events()[-1]))
    under_way.start()
    _until(lambda: front.sidecar.limits.under_way == 1)
    front.sidecar.limits.drain(60)
    assert front.http.get("/ready").json() == {"ready": False, "reason": "this server is stopping"}
    assert front.http.get("/health").status_code == 200
    refused = ask(front)
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "This server is stopping.")
    assert not front.sidecar.limits.drained
    front.engine.hold.set()
    under_way.join()
    assert found[0]["reasonguard"]["guarded"] is True
    _until(lambda: front.sidecar.limits.drained)
    assert turned_away(front) == {"drain": 1}


def test_a_drain_ends_when_its_time_is_over() -> None:
    ours = Limits(Metrics())
    assert not ours.drained
    with ours.one_more():
        ours.drain(60)
        assert not ours.drained
        ours.drain(0)
        assert ours.drained


def test_the_first_sigterm_drains_and_the_second_stops() -> None:
    nothing, ours = Starlette(), Limits(Metrics())
    server = Server(nothing, ours, 60)
    server.handle_exit(signal.SIGTERM, None)
    assert (ours.draining, server.should_exit) == (True, False)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    interrupted = Server(nothing, Limits(Metrics()), 60)
    interrupted.handle_exit(signal.SIGINT, None)
    assert interrupted.should_exit


def test_other_routes_are_not_counted(start: Start) -> None:
    front = limited(start, streams=1)
    with front.sidecar.limits.one_more():
        assert front.http.get("/metrics").status_code == 200
        assert front.http.get("/v1/models").status_code == 200
        assert ask(front).status_code == 503


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
