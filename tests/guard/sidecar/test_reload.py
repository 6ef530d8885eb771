"""The exchange of weights step by step, on an engine client that fails where a test wants it to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar import versions as following
from guard.sidecar.app import create_app
from guard.sidecar.context import build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.reload import PATH, WeightsRoute
from guard.sidecar.upstream import Upstream
from guard.traces import Spool
from guard.weights import Registry
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.scripted import ScriptedEngine, trace_of
from tests.guard.test_weights import version

PAUSE, RESUME, ABORT = "pause keep True", "resume", "pause abort False"


@dataclass
class EngineClient:
    """vLLM's client as the route uses it; models in `bad` do not load."""

    bad: frozenset[str] = frozenset()
    calls: list[str] = field(default_factory=list)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode} {clear_cache}")

    async def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        self.calls.append(f"{method} {kwargs['weights_path']}")
        if kwargs["weights_path"] in self.bad:
            raise RuntimeError("shapes differ")

    async def resume_generation(self) -> None:
        self.calls.append("resume")


def engine(client: EngineClient, **options: Any) -> Starlette:
    app = Starlette(middleware=[Middleware(WeightsRoute)], **options)
    app.state.engine_client = client
    return app


@pytest.mark.parametrize(("bad", "status", "calls"), [
    ((), 200, [PAUSE, "reload_weights new", RESUME]),
    (("new",), 409, [PAUSE, "reload_weights new", "reload_weights old", RESUME]),
    (("new", "old"), 500, [PAUSE, "reload_weights new", "reload_weights old", ABORT]),
])  # fmt: skip
def test_no_request_runs_on_half_of_a_model(bad: tuple[str, ...], status: int, calls: list[str]) -> None:
    client = EngineClient(frozenset(bad))
    with running(engine(client)) as url:
        response = httpx.post(f"{url}{PATH}", json={"load": "new", "back": "old"}, trust_env=False)
        assert (response.status_code, client.calls) == (status, calls)
        assert ("RuntimeError: shapes differ" in response.text) is (status != 200)
        for body in (b"{", b"[]", b'{"load": "new"}'):
            assert httpx.post(f"{url}{PATH}", content=body, trust_env=False).status_code == 400
        assert httpx.get(f"{url}/other", trust_env=False).status_code == 404
    assert client.calls == calls


def test_an_engine_without_whole_weights_answers_nobody(
    runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_POLL", 0.02)
    spool, registry = tmp_path / "spool", Registry(tmp_path / "versions")
    base = version(tmp_path / "base", 1) / "model"
    version(registry.root, 1)
    scripted = ScriptedEngine(spool, lambda i: [trace_of(i, Policy()).model_copy(update={"weights": "base"})])
    scripted.hold.set()
    client = EngineClient(frozenset({str(base), str(registry.model(1))}))
    with running(engine(client, routes=scripted.app().routes)) as url:
        sidecar = build_sidecar(
            replace(runtime, model=str(base)), neutraliser, Upstream(url, "key"), SpoolFollower(spool), secret="s",
            alive=lambda: True, spool=Spool(spool), served_name="scripted", allow_seed=True, registry=registry,
            weights="base",
        )  # fmt: skip
        sidecar.probe.proven, sidecar.probe.reason, sidecar.probe._proved = True, None, time.monotonic()
        with running(create_app(sidecar)) as front, httpx.Client(base_url=front, trust_env=False) as http:
            body = {"messages": [{"role": "user", "content": "Hello"}]}
            while http.get("/ready").status_code != 200:
                time.sleep(0.02)
            assert http.post("/v1/chat/completions", json=body).json()["reasonguard"]["version"] == 0
            (registry.root / "current").write_text("1")
            deadline = time.monotonic() + 20
            while http.get("/ready").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            refused = http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert refused.json()["error"]["message"] == "No request is taken: The engine holds no whole weights (HTTP 500)."


def test_weights_that_are_no_version_are_not_proven(
    runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path
) -> None:
    scripted = ScriptedEngine(tmp_path, lambda i: [trace_of(i, Policy()).model_copy(update={"weights": "strange"})])
    scripted.hold.set()
    with running(scripted.app()) as url:
        sidecar = build_sidecar(
            runtime, neutraliser, Upstream(url, "key"), SpoolFollower(tmp_path), secret="s", alive=lambda: True,
            spool=Spool(tmp_path), served_name="scripted", allow_seed=True, registry=Registry(tmp_path / "none"),
            weights="base",
        )  # fmt: skip
        sidecar.probe.proven = True
        with running(create_app(sidecar)) as front, httpx.Client(base_url=front, trust_env=False) as http:
            while sidecar.exchanging:
                time.sleep(0.02)
            response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert (response.status_code, response.json()["error"]["code"]) == (502, "not_guarded")
    assert "weights strange answered, which are no version" in response.json()["error"]["message"]
