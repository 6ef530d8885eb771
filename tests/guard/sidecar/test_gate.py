"""Keys over real HTTP in front of a scripted engine: who gets in, under which policy, within which quotas."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.keys import Quotas, hash_of
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.rules import Rules
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import Upstream
from guard.traces import Spool, Trace
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.scripted import ScriptedEngine, trace_of

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
KEY_A, KEY_B = "rg-" + "a" * 43, "rg-" + "b" * 43
OPEN = Policy(name="lenient", fail_mode="open")
UNKNOWN = {
    "error": {
        "message": "This server takes a key that its operator gave out.", "type": "invalid_request_error",
        "param": None, "code": "invalid_api_key",
    },
}  # fmt: skip


@dataclass
class Front:
    """A sidecar with two keys, its scripted engine and a client."""

    engine: ScriptedEngine
    sidecar: Sidecar
    http: httpx.Client

    def chat(self, key: str | None, *, scheme: str = "Bearer", **body: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"{scheme} {key}"}
        return self.http.post("/v1/chat/completions", json={**HELLO, **body}, headers=headers)

    def counted(self) -> dict[str, float]:
        """Chat requests by outcome."""
        family = next(f for f in self.sidecar.metrics.registry.collect() if f.name == "reasonguard_requests")
        return {s.labels["result"]: s.value for s in family.samples if s.name.endswith("_total")}

    def told(self) -> dict[str, str]:
        """What the engine's guard was told with the last request."""
        told: dict[str, str] = self.engine.body["vllm_xargs"]
        return told

    def give(self, quotas: Quotas) -> None:
        """Team A gets quotas."""
        a = Tenant("team-a", self.sidecar.runtime, quotas=quotas)
        self.sidecar.adopt(Rules(self.sidecar.rules.default, {hash_of(KEY_A): a}))


@pytest.fixture
def front(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Iterator[Front]:
    """The engine applies whatever policy it is told, and says so in its trace."""
    engine = ScriptedEngine(tmp_path, lambda guard_id: told_trace(guard_id, engine.body["vllm_xargs"]))
    engine.hold.set()
    with contextlib.ExitStack() as stack:
        upstream = Upstream(stack.enter_context(running(engine.app())), "key")
        sidecar = build_sidecar(
            runtime, neutraliser, upstream, SpoolFollower(tmp_path), secret="s", alive=lambda: True,
            spool=Spool(tmp_path), served_name="scripted", allow_seed=True,
        )  # fmt: skip
        sidecar.probe.proven = True
        sidecar.receipt_wait = 0.3
        sidecar.adopt(Rules(sidecar.rules.default, {
            hash_of(KEY_A): Tenant("team-a", runtime), hash_of(KEY_B): Tenant("team-b", runtime.under(OPEN), "d-2"),
        }))  # fmt: skip
        url = stack.enter_context(running(create_app(sidecar)))
        yield Front(engine, sidecar, stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30)))


def told_trace(guard_id: str, told: dict[str, str], **receipt: Any) -> list[Trace]:
    policy = Policy.model_validate_json(told["guard_policy"])
    trace = trace_of(guard_id, policy, **receipt)
    return [trace.model_copy(update={"tenant": told.get("guard_tenant", "")})]


@pytest.mark.parametrize(("key", "scheme"), [
    (None, "Bearer"), ("x", "Bearer"), (KEY_A[:-1], "Bearer"), (KEY_A + "a", "Bearer"), (KEY_A, "Basic"),
    (hash_of(KEY_A), "Bearer"), ("rg-\u00ff", "Bearer"),
])  # fmt: skip
def test_without_a_known_key_nothing_is_answered(front: Front, key: str | None, scheme: str) -> None:
    headers = {} if key is None else {"authorization": f"{scheme} {key}".encode("latin-1")}
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/"), ("POST", "/v1/x")):
        response = front.http.request(method, path, json=HELLO, headers=headers)
        assert (response.status_code, response.json()) == (401, UNKNOWN)
        assert response.headers["www-authenticate"] == "Bearer"
    assert front.engine.body == {}
    assert front.counted() == {"unauthorized": 4}


def test_health_and_metrics_need_no_key(front: Front) -> None:
    assert front.http.get("/health").status_code == 200
    assert front.http.get("/openapi.json").status_code == 200
    assert front.http.get("/ready").status_code == 503
    page = front.http.get("/metrics").text
    assert "reasonguard_keys 2.0" in page
    assert "team-a" not in page


def test_each_key_has_its_own_policy_and_tenant(front: Front) -> None:
    response = front.chat(KEY_A)
    assert response.status_code == 200
    guard_id = response.headers["x-reasonguard-id"]
    assert front.told() == {
        "guard_id": guard_id, "guard_secret": "s", "guard_policy": Policy().canonical, "guard_tenant": "team-a",
    }  # fmt: skip
    assert response.json()["reasonguard"]["policy_hash"] == Policy().hash
    answer = front.chat(KEY_B, scheme="bearer").json()["reasonguard"]
    assert (answer["guarded"], answer["policy"], answer["policy_hash"]) == (True, "lenient", OPEN.hash)
    assert (front.told()["guard_tenant"], front.told()["guard_detector"]) == ("team-b", "d-2")
    assert front.http.get("/v1/models", headers={"authorization": f"Bearer {KEY_B}"}).status_code == 200


def test_no_tenant_shares_anothers_prefixes_in_the_engines_cache(front: Front) -> None:
    front.sidecar.completions = True
    salts: dict[str, set[str]] = {}
    bodies = {"chat/completions": HELLO, "responses": {"input": "Hello"}, "completions": {"prompt": "Hello"}}
    for key in (KEY_A, KEY_B):
        for path, body in bodies.items():
            for stream in (False, True):
                headers = {"authorization": f"Bearer {key}"}
                said = front.http.post(f"/v1/{path}", json={**body, "stream": stream}, headers=headers)
                assert said.status_code == 200
                salts.setdefault(key, set()).add(front.engine.body["cache_salt"])
    # HMAC-SHA256 of the tenant's name under the secret.
    a = "a84175a8564ab86edcaba1343bfcdfb984224f2186980113b2287e1649a276dd"
    assert salts[KEY_A] == {a}
    assert len(salts[KEY_B]) == 1
    assert salts[KEY_A] != salts[KEY_B]
    assert front.chat(KEY_A, cache_salt=a).status_code == 400
    # Without keys there is nobody to keep apart.
    front.sidecar.adopt(Rules(front.sidecar.rules.default, None))
    assert front.chat(None).status_code == 200
    assert "cache_salt" not in front.engine.body


def test_the_fail_mode_is_the_keys(front: Front) -> None:
    front.engine.traces = lambda guard_id: told_trace(guard_id, front.told(), scored=0, unscored=1)
    assert front.chat(KEY_A).status_code == 502
    passed = front.chat(KEY_B)
    assert (passed.status_code, passed.json()["reasonguard"]["guarded"]) == (200, False)
    front.sidecar.probe.proven = False
    assert front.chat(KEY_A).status_code == 503
    assert front.chat(KEY_B).status_code == 200


def test_an_engine_that_applies_anothers_policy_is_no_proof(front: Front) -> None:
    front.engine.traces = lambda guard_id: [trace_of(guard_id, OPEN)]
    response = front.chat(KEY_A)
    assert response.status_code == 502
    assert f"the engine applied policy {OPEN.hash}, not {Policy().hash}" in response.json()["error"]["message"]


def test_a_client_cannot_name_a_policy_itself(front: Front) -> None:
    for name in ("guard_policy", "guard_secret", "guard_tenant", "vllm_xargs"):
        response = front.chat(KEY_A, **{name: OPEN.canonical})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "refused_parameter")


def test_requests_per_minute_are_told_with_retry_after(front: Front) -> None:
    front.give(Quotas(requests_per_minute=2))
    assert [front.chat(KEY_A).status_code for _ in range(3)] == [200, 200, 429]
    response = front.chat(KEY_A)
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert front.http.get("/v1/models", headers={"authorization": f"Bearer {KEY_A}"}).status_code == 200
    assert front.counted() == {"guarded": 2, "limited": 2}


def test_a_stream_is_under_way_until_its_end(front: Front) -> None:
    front.give(Quotas(concurrent=1))
    front.engine.hold.clear()
    headers = {"authorization": f"Bearer {KEY_A}"}
    with front.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert front.chat(KEY_A).status_code == 429
        front.engine.hold.set()
        assert list(lines)[-2] == "data: [DONE]"
    _until(lambda: front.sidecar.meter._usage["team-a"].under_way == 0)
    assert front.chat(KEY_A).status_code == 200


def test_who_leaves_early_has_no_request_under_way_any_more(front: Front) -> None:
    front.give(Quotas(concurrent=1))
    front.engine.hold.clear()
    headers = {"authorization": f"Bearer {KEY_A}"}
    with front.http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}, headers=headers) as stream:
        next(stream.iter_lines())
    _until(lambda: front.sidecar.meter._usage["team-a"].under_way == 0)
    with pytest.raises(httpx.ReadTimeout):
        front.http.post("/v1/chat/completions", json=HELLO, headers=headers, timeout=0.5)
    front.engine.hold.set()
    _until(lambda: front.sidecar.meter._usage["team-a"].under_way == 0)
    assert front.chat(KEY_A, temperature=9).status_code == 400
    assert front.chat(KEY_A).status_code == 200


def test_tokens_are_charged_once_and_also_for_those_who_left(front: Front) -> None:
    # A scripted trace has 1 prompt and 3 output tokens.
    front.give(Quotas(tokens_per_day=1000))
    front.engine.traces = lambda i: [*told_trace(i, front.told(), tokens=1), *told_trace(i, front.told())]
    assert front.chat(KEY_A).status_code == 200
    day = front.sidecar.meter._usage["team-a"].day
    assert day is not None
    assert 1000 - day.level == pytest.approx(4, abs=0.9)
    left = trace_of("left", Policy(), tokens=500).model_copy(update={"tenant": "team-a"})
    front.sidecar.spool.append(left.keeping("none"))
    _until(lambda: 1000 - day.level == pytest.approx(505, abs=2))
    front.sidecar.spool.append(trace_of("b", Policy(), tokens=900).model_copy(update={"tenant": "team-a"}))
    _until(lambda: front.chat(KEY_A).status_code == 429)
    response = front.chat(KEY_A)
    assert response.json()["error"]["message"] == "This key's 1000 tokens per day are used up."
    assert int(response.headers["retry-after"]) > 3600


def test_a_request_under_way_ends_under_the_rules_it_began_with(front: Front, runtime: GuardRuntime) -> None:
    front.engine.hold.clear()
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(front.chat(KEY_A)))
    waiting.start()
    _until(lambda: bool(front.engine.body))
    before = front.told()
    front.engine.traces = lambda guard_id: told_trace(guard_id, before)
    other = runtime.under(Policy(name="new"))
    front.sidecar.adopt(Rules(Tenant("", other), {hash_of(KEY_A): Tenant("team-a", other)}))
    front.engine.hold.set()
    waiting.join()
    assert answers[0].json()["reasonguard"]["policy_hash"] == Policy().hash
    front.engine.traces = lambda guard_id: told_trace(guard_id, front.told())
    assert front.chat(KEY_A).json()["reasonguard"]["policy"] == "new"
    assert front.chat(KEY_B).status_code == 401


def test_no_key_is_logged_or_counted_or_told(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    stranger = "rg-" + "z" * 43
    with caplog.at_level(logging.DEBUG):
        said = [front.chat(key, temperature=t).text for key in (KEY_A, KEY_B, stranger) for t in (0, 9)]
    said += [front.http.get("/metrics").text, caplog.text, json.dumps(front.engine.body), front.engine.authorization]
    said += [path.read_text() for path in front.engine.spool.glob("spool-*")]
    for key in (KEY_A, KEY_B, stranger):
        assert [text for text in said if key in text or hash_of(key) in text] == []


def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
