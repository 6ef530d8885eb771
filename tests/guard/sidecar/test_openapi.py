"""The OpenAPI document says what the sidecar takes, and nothing that is sent to it makes it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.admin import Reloader
from guard.sidecar.app import create_app
from guard.sidecar.completions import CompletionRequest
from guard.sidecar.context import build_sidecar
from guard.sidecar.fields import DROPPED, ChatRequest
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.openapi import document
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.responses_fields import RESPONSES_DROPPED, ResponsesRequest
from guard.sidecar.rules import RulesReader, Sources
from guard.sidecar.upstream import Upstream
from guard.traces import Spool, Trace
from tests.guard.sidecar.fronts import RemoteFront, until
from tests.guard.sidecar.fuzz import fuzz
from tests.guard.sidecar.scripted import ScriptedEngine, probe_trace, trace_of
from tests.guard.sidecar.serving import running

TOKEN = "an-operators-token"


@pytest.fixture
def injecting(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Iterator[tuple[str, Starlette]]:
    """A sidecar, and its URL, whose scripted engine proves what it is told to and answers everything."""

    def told(guard_id: str) -> list[Trace]:
        args = engine.body["vllm_xargs"]
        policy = Policy.model_validate_json(args["guard_policy"])
        probes = "guard_probe" in args
        trace = probe_trace(guard_id, policy, runtime) if probes else trace_of(guard_id, policy)
        engine.tokens = trace.output_tokens
        return [trace]

    engine = ScriptedEngine(tmp_path, told)
    engine.hold.set()
    with running(engine.app()) as upstream:
        sidecar = build_sidecar(
            replace(runtime, policy=Policy()), neutraliser, Upstream(upstream, "key"), SpoolFollower(tmp_path),
            secret="s", alive=lambda: True, spool=Spool(tmp_path), served_name="scripted", allow_seed=True,
        )  # fmt: skip
        sidecar.reloader = Reloader(sidecar, RulesReader(Sources(), runtime), TOKEN)
        sidecar.completions = True
        app = create_app(sidecar)
        with running(app) as url:
            until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 200)
            yield url, app


def test_no_request_makes_a_sidecar_fail_that_injects(injecting: tuple[str, Starlette], tmp_path: Path) -> None:
    url, _ = injecting
    assert fuzz(url, 40, tmp_path, f"--header=authorization: Bearer {TOKEN}") > 500


def test_no_request_makes_a_sidecar_fail_that_substitutes(remotes: Callable[..., RemoteFront], tmp_path: Path) -> None:
    front = remotes(1)
    front.sidecar.completions = True
    assert fuzz(str(front.http.base_url), 60, tmp_path, edges=False) > 150


def test_the_document_names_every_route_and_its_methods(injecting: tuple[str, Starlette]) -> None:
    url, app = injecting
    found = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    served = {(r.path, m.lower()) for r in app.routes if isinstance(r, Route) for m in (r.methods or ()) if m != "HEAD"}
    assert {(path, method) for path, methods in found["paths"].items() for method in methods} == served
    for path, method in served:
        other = "GET" if method == "post" else "POST"
        refused = httpx.request(other, f"{url}{path}", trust_env=False)
        assert (refused.status_code, method.upper() in refused.headers["allow"]) == (405, True)


def test_a_request_is_the_one_that_the_firewall_reads() -> None:
    schemas = document()["components"]["schemas"]
    for model, dropped in ((ChatRequest, DROPPED), (CompletionRequest, DROPPED), (ResponsesRequest, RESPONSES_DROPPED)):
        schema = schemas[model.__name__]
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == {*model.model_fields, *dropped}
    temperature = {"maximum": 2, "minimum": 0, "type": "number"}
    for name in ("ChatRequest", "ResponsesRequest"):
        assert schemas[name]["properties"]["temperature"]["anyOf"] == [temperature, {"type": "null"}]
    assert schemas["ResponsesRequest"]["properties"]["stop"] == schemas["ChatRequest"]["properties"]["stop"]
    assert set(schemas["Attached"]["required"]) >= {"guard_id", "guarded", "mode", "policy", "policy_hash"}
    assert schemas["Attached"]["properties"]["zones"]["items"]["enum"] == ["reasoning", "answer"]
    assert "unwatched_tokens" in schemas["Attached"]["properties"]
