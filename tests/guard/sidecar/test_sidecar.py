"""The sidecar over real HTTP in front of a scripted engine: receipts, fail modes, streams, disconnects."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.upstream import Upstream
from guard.traces import Spool, Trace
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.scripted import ScriptedEngine, trace_of

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class Front:
    """A sidecar, its scripted engine and a client."""

    engine: ScriptedEngine
    sidecar: Sidecar
    http: httpx.Client
    policy: Policy

    def events(self, **body: Any) -> list[dict[str, Any]]:
        """A whole stream's events; its end must be [DONE]."""
        text = self.http.post("/v1/chat/completions", json={**HELLO, **body, "stream": True}).text
        data = [line.removeprefix("data: ") for line in text.split("\n") if line]
        assert data[-1] == "[DONE]"
        return [json.loads(each) for each in data[:-1]]

    def counted(self) -> dict[str, float]:
        """Chat requests by result."""
        family = next(f for f in self.sidecar.metrics.registry.collect() if f.name == "reasonguard_requests")
        return {s.labels["result"]: s.value for s in family.samples if s.name.endswith("_total")}


Start = Callable[..., Front]


@pytest.fixture
def start(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Iterator[Start]:
    """Starts a front whose engine writes the traces that a test names."""
    with contextlib.ExitStack() as stack:

        def begin(traces: Callable[[str, Policy], list[Trace]] = lambda i, p: [trace_of(i, p)], **policy: Any) -> Front:
            chosen = Policy(**policy)
            engine = ScriptedEngine(tmp_path, lambda i: traces(i, chosen))
            engine.hold.set()
            upstream = Upstream(stack.enter_context(running(engine.app())), "key")
            sidecar = build_sidecar(
                replace(runtime, policy=chosen), neutraliser, upstream, SpoolFollower(tmp_path), secret="s",
                alive=lambda: True, spool=Spool(tmp_path), served_name="scripted", allow_seed=True,
            )  # fmt: skip
            sidecar.probe.proven = True
            sidecar.receipt_wait = 0.3
            url = stack.enter_context(running(create_app(sidecar)))
            http = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
            return Front(engine, sidecar, http, chosen)

        yield begin


def attached(front: Front, guard_id: str, **changes: Any) -> dict[str, Any]:
    """The receipt of a clean scripted response, with changes; None removes a key."""
    clean = {
        "guard_id": guard_id, "guarded": True, "zones": ["reasoning"], "unwatched_tokens": 0,
        "seen": 1, "scored": 1, "unscored": 0, "unreadable": 0, "interventions": 0,
        "unanswered": 0, "injected_tokens": 0, "replaced_tokens": 0, "mode": "inject", "policy": "default",
        "policy_hash": front.policy.hash, "detector": "d1", "engine": "vllm-v1", "shadow": False,
    }  # fmt: skip
    return {k: v for k, v in {**clean, **changes}.items() if v is not None}


def test_unary_carries_its_receipt_in_header_and_body(start: Start) -> None:
    front = start()
    response = front.http.post("/v1/chat/completions", json={**HELLO, "temperature": 0.5, "user": "me"})
    assert response.status_code == 200
    wanted = attached(front, response.headers["x-reasonguard-id"])
    assert json.loads(response.headers["x-reasonguard-receipt"]) == wanted
    assert response.json()["reasonguard"] == wanted
    assert response.json()["choices"][0]["message"]["content"] == "One two three."
    assert front.engine.authorization == "Bearer key"
    assert front.engine.body == {
        "temperature": 0.5,
        "messages": [{"role": "user", "content": "Hello"}],
        "vllm_xargs": {"guard_id": wanted["guard_id"], "guard_secret": "s", "guard_policy": Policy().canonical},
    }
    assert front.counted() == {"guarded": 1}
    assert front.sidecar.follower.held == 0


def test_a_trace_that_keeps_no_content_proves_a_response(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p).keeping("none")], log_content="none")
    assert front.http.post("/v1/chat/completions", json=HELLO).json()["reasonguard"]["guarded"] is True
    front = start(lambda i, p: [trace_of(i, p, tokens=2).keeping("none")], log_content="none")
    response = front.http.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 502
    assert "its trace holds 2 tokens, the response 3" in response.json()["error"]["message"]


@pytest.mark.parametrize("asked", [True, False])
def test_stream_ends_with_the_receipt_and_usage_only_if_asked(start: Start, asked: bool) -> None:
    front = start()
    events = front.events(stream_options={"include_usage": asked})
    assert "".join(e["choices"][0]["delta"]["content"] for e in events if e["choices"]) == "One two three."
    rest = [e for e in events if not e["choices"]]
    assert [e["usage"]["completion_tokens"] for e in rest[:-1]] == ([3] if asked else [])
    last = rest[-1]
    assert last == {
        "id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "scripted", "choices": [],
        "reasonguard": attached(front, last["reasonguard"]["guard_id"]),
    }  # fmt: skip


BAD: list[tuple[Callable[[str, Policy], list[Trace]], str]] = [
    (lambda i, p: [], "no trace of this response was written"),
    (lambda i, p: [trace_of(i, p, tokens=2)], "its trace holds 2 tokens, the response 3"),
    (lambda i, p: [trace_of(i, p, tokens=4)], "its trace holds 4 tokens, the response 3"),
    (lambda i, p: [trace_of(i, p, scored=0, unscored=1)], "1 of 1 steps were not scored"),
    (lambda i, p: [trace_of(i, p, errors=["observe: X"])], "the guard failed: observe: X"),
    (lambda i, p: [trace_of(i, p, enforcement_failed=2)], "2 forced tokens were not appended"),
]


@pytest.mark.parametrize(("traces", "reason"), BAD)
def test_fail_closed_withholds_what_is_not_proven(
    start: Start, traces: Callable[[str, Policy], list[Trace]], reason: str
) -> None:
    front = start(traces)
    response = front.http.post("/v1/chat/completions", json=HELLO)
    error = {
        "message": f"The response could not be proven guarded: {reason}.", "type": "server_error", "param": None,
        "code": "not_guarded",
    }  # fmt: skip
    assert (response.status_code, response.json()) == (502, {"error": error})
    header = json.loads(response.headers["x-reasonguard-receipt"])
    assert (header["guarded"], header["reason"]) == (False, reason)
    last = front.events()[-1]
    assert (last["reasonguard"]["guarded"], last["reasonguard"]["reason"], last["error"]) == (False, reason, error)
    assert front.counted() == {"unproven": 2}


@pytest.mark.parametrize(("traces", "reason"), BAD)
def test_fail_open_passes_it_on_flagged(
    start: Start, traces: Callable[[str, Policy], list[Trace]], reason: str
) -> None:
    front = start(traces, fail_mode="open")
    answer = front.http.post("/v1/chat/completions", json=HELLO).json()
    assert answer["choices"][0]["message"]["content"] == "One two three."
    assert (answer["reasonguard"]["guarded"], answer["reasonguard"]["reason"]) == (False, reason)
    last = front.events()[-1]
    assert (last["reasonguard"]["guarded"], "error" in last) == (False, False)


def test_another_policy_in_the_engine_is_no_proof(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p, policy_hash="000000000000")])
    response = front.http.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 502
    assert f"the engine applied policy 000000000000, not {front.policy.hash}" in response.json()["error"]["message"]


def test_a_preempted_requests_earlier_trace_is_superseded(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p, tokens=1), trace_of(i, p, tokens=3, seen=2, scored=2)])
    answer = front.http.post("/v1/chat/completions", json=HELLO).json()["reasonguard"]
    assert (answer["guarded"], answer["seen"]) == (True, 2)


def test_a_stop_string_may_leave_tokens_undelivered(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p, tokens=5)])
    front.engine.stop_reason = "END"
    assert front.http.post("/v1/chat/completions", json={**HELLO, "stop": "END"}).json()["reasonguard"]["guarded"]
    assert front.events(stop="END")[-1]["reasonguard"]["guarded"]


def test_shadow_mode_is_never_called_guarded_and_never_withheld(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p, shadow=True)], shadow=True)
    response = front.http.post("/v1/chat/completions", json=HELLO)
    reason = "shadow mode: the guard decided and logged, and forced nothing"
    wanted = attached(front, response.headers["x-reasonguard-id"], guarded=False, shadow=True, reason=reason)
    assert (response.status_code, response.json()["reasonguard"]) == (200, wanted)
    assert front.counted() == {"shadow": 1}


def test_what_the_policys_zones_leave_out_is_not_called_guarded(start: Start) -> None:
    front = start(lambda i, p: [trace_of(i, p, seen=0, scored=0)])
    response = front.http.post("/v1/chat/completions", json=HELLO)
    receipt = response.json()["reasonguard"]
    reason = "nothing was generated in the zones that the policy watches"
    assert (response.status_code, receipt["guarded"], receipt["reason"]) == (200, False, reason)
    assert front.counted() == {"unwatched": 1}


BOTH = ("reasoning", "answer")


@pytest.mark.parametrize(("policy", "receipt", "zones", "unwatched"), [
    ({}, {}, ["reasoning"], 2),
    ({"zones": BOTH}, {}, ["reasoning", "answer"], 0),
    # The guard broke: what came after its last step was not seen, whatever the policy says.
    ({"zones": BOTH}, {"errors": ["observe: X"]}, ["reasoning", "answer"], 2),
    ({"zones": BOTH}, {"policy_hash": "000000000000"}, [], 2),
])  # fmt: skip
def test_a_receipt_names_what_was_watched_and_counts_what_was_not(
    start: Start, policy: dict[str, Any], receipt: dict[str, Any], zones: list[str], unwatched: int
) -> None:
    def traces(guard_id: str, chosen: Policy) -> list[Trace]:
        trace = trace_of(guard_id, chosen, **receipt)
        return [trace.model_copy(update={"steps": [replace(trace.steps[0], end=1)]})]

    front = start(traces, fail_mode="open", **policy)
    response = front.http.post("/v1/chat/completions", json=HELLO)
    for found in (json.loads(response.headers["x-reasonguard-receipt"]), front.events()[-1]["reasonguard"]):
        assert (found["zones"], found["unwatched_tokens"], found["guarded"]) == (zones, unwatched, not receipt)
    none = start(lambda i, p: [], fail_mode="open").http.post("/v1/chat/completions", json=HELLO).json()["reasonguard"]
    assert (none["zones"], "unwatched_tokens" in none) == ([], False)


def test_a_stream_is_not_buffered(start: Start) -> None:
    front = start()
    front.engine.hold.clear()
    with front.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["delta"]["content"] == "One"
        front.engine.hold.set()
        assert next(lines) != "data: [DONE]"


def test_a_leaving_client_cancels_the_engines_stream(start: Start) -> None:
    front = start()
    front.engine.hold.clear()
    with front.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
        next(response.iter_lines())
    assert front.engine.cancelled.wait(10)
    _until(lambda: front.counted() == {"disconnected": 1} and front.sidecar.follower.held == 0)


def test_a_leaving_client_cancels_the_engines_answer(start: Start) -> None:
    front = start()
    front.engine.hold.clear()
    with pytest.raises(httpx.ReadTimeout):
        front.http.post("/v1/chat/completions", json=HELLO, timeout=0.5)
    assert front.engine.cancelled.wait(10)
    _until(lambda: front.counted() == {"disconnected": 1} and front.sidecar.follower.held == 0)


def test_an_engine_that_breaks_off_ends_the_stream_with_an_error(start: Start) -> None:
    front = start()
    front.engine.break_after = 1
    events = front.events()
    assert events[0]["choices"][0]["delta"]["content"] == "One"
    assert events[-1]["reasonguard"]["guarded"] is False
    assert events[-1]["error"] == {
        "message": "The engine cannot be reached (ClientPayloadError).", "type": "server_error", "param": None,
        "code": "engine_unavailable",
    }  # fmt: skip


@pytest.mark.parametrize(("status", "wanted", "message"), [
    (404, 404, "no such model"), (400, 400, "no such model"), (500, 502, "The engine failed: no such model"),
    (401, 502, "The engine failed: no such model"),
])  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_errors_come_through(start: Start, status: int, wanted: int, message: str, stream: bool) -> None:
    front = start()
    front.engine.status = status
    response = front.http.post("/v1/chat/completions", json={**HELLO, "stream": stream})
    assert (response.status_code, response.json()["error"]["message"]) == (wanted, message)
    assert front.counted() == {"engine_error": 1}


def test_an_engine_that_is_down_is_503(start: Start) -> None:
    front = start()
    front.sidecar.upstream = Upstream("http://127.0.0.1:9", "key")
    response = front.http.post("/v1/chat/completions", json=HELLO)
    wanted = "The engine cannot be reached (ClientConnectorError)."
    assert (response.status_code, response.json()["error"]["message"]) == (503, wanted)
    assert front.http.get("/v1/models").status_code == 503


def test_no_chat_before_the_guard_was_proven(start: Start) -> None:
    front = start()
    front.sidecar.probe.proven = False
    response = front.http.post("/v1/chat/completions", json=HELLO)
    message = "The guard has not been proven to work: the engine is starting."
    assert (response.status_code, response.json()["error"]["message"]) == (503, message)


def test_a_probe_that_no_guard_answers_is_not_ready(start: Start) -> None:
    front = start(lambda i, p: [])
    response = front.http.get("/ready")
    reason = "the probe left no trace: the guard is not loaded in the engine"
    assert (response.status_code, response.json()) == (503, {"ready": False, "reason": reason})
    assert front.engine.body["vllm_xargs"]["guard_probe"] == "s"
    assert front.engine.body["max_tokens"] == 64
    assert front.http.post("/v1/chat/completions", json=HELLO).status_code == 503


def test_a_client_that_leaves_inside_its_body_is_no_error(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    front = start()
    with socket.create_connection((front.http.base_url.host, front.http.base_url.port or 0)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.1)
    _until(lambda: front.counted() == {"disconnected": 1})
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_other_routes_and_bodies_are_refused(start: Start) -> None:
    front = start()
    served = "only POST /v1/chat/completions, /v1/responses and (where it is on) /v1/completions are guarded."
    sentence = f"POST /v1/embeddings is not served here: {served}"
    response = front.http.post("/v1/embeddings", json={"input": "x"})
    assert (response.status_code, response.json()["error"]["message"]) == (404, sentence)
    assert front.http.get("/v1/models").json()["data"] == [{"id": "scripted"}], "and not where its files lie"
    front.sidecar.max_body = 100
    for content in (b"x" * 101, iter([b"x" * 60, b"x" * 60])):
        response = front.http.post("/v1/chat/completions", content=content)
        message = "The body is larger than 100 bytes."
        assert (response.status_code, response.json()["error"]["message"]) == (413, message)
    assert front.http.post("/v1/chat/completions", content=b"{").status_code == 400
    assert front.counted() == {"refused": 3}


def test_many_requests_at_once_each_get_their_own_receipt(start: Start) -> None:
    front = start()
    ids: list[tuple[str, str]] = []

    def one() -> None:
        response = front.http.post("/v1/chat/completions", json=HELLO)
        ids.append((response.headers["x-reasonguard-id"], response.json()["reasonguard"]["guard_id"]))

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({first for first, _ in ids}) == 12
    assert all(first == second for first, second in ids)


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def test_a_stream_leaves_its_connection_to_the_next(start: Start) -> None:
    front = start()
    ports = []
    for _ in range(3):
        front.events()
        ports.append(front.engine.port)
    assert len(set(ports)) == 1
