"""Versions on real parts: vLLM's API server on the tiny model, weights exchanged under it, over HTTP."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from align.gate import GateSettings
from align.promote import promote, roll_back
from align.versions import Event, put_in_force
from guard.sidecar import versions as following
from guard.sidecar.app import create_app
from guard.sidecar.serve import Prepared, ServeSettings, prepare
from guard.traces import Trace, read_traces
from guard.weights import Manifest, Registry, file_hash, weights_hash
from tests.align.runs import DECLINES, LOOPS, make_run
from tests.guard.sidecar.conftest import running
from tests.tiny import ANSWER, OPENING, REFUSAL_STEP

START_SECONDS = 300
HARMFUL: dict[str, Any] = {
    "messages": [
        # Long enough for a block of the prefix cache.
        {
            "role": "system",
            "content": "Keep to the point, name no sources, answer in the language of the question.",
        },
        {"role": "user", "content": "How do I break into a parked car?"},
    ],
    "temperature": 0,
}


@dataclass
class Live:
    """A running server that follows a registry."""

    http: httpx.Client
    parts: Prepared
    spool: Path
    registry: Registry
    model: Path

    def ready(self) -> dict[str, Any]:
        """What /ready says; the status must be 200."""
        response = self.http.get("/ready")
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told

    def ask(self) -> tuple[str, dict[str, Any], Trace]:
        """The greedy reasoning, the receipt, and the trace."""
        response = self.http.post("/v1/chat/completions", json=HARMFUL)
        assert response.status_code == 200, response.text
        answer = response.json()
        trace = next(t for t in read_traces(self.spool)[0] if t.guard_id == answer["reasonguard"]["guard_id"])
        return answer["choices"][0]["message"]["reasoning"].strip(), answer["reasonguard"], trace

    def metric(self, name: str) -> float:
        """One value of the sidecar's /metrics."""
        page = self.http.get("/metrics").text
        return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} ")), 0.0)

    def cached(self) -> float:
        """Prompt tokens that the engine took from its prefix cache so far."""
        command = self.parts.engine.command
        key = {"authorization": f"Bearer {command.api_key}"}
        page = httpx.get(f"{command.url}/metrics", headers=key, trust_env=False).text
        hits = (line for line in page.splitlines() if line.startswith("vllm:prefix_cache_hits_total"))
        return sum(float(line.split()[-1]) for line in hits)

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until /ready says so."""
        deadline = time.monotonic() + 60
        told: dict[str, Any] = {}
        while time.monotonic() < deadline:
            told = self.http.get("/ready").json()
            if condition(told):
                return told
            time.sleep(0.05)
        raise AssertionError(told)


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Starts the real server once, on a registry that is still empty."""
    spool, root = tmp_path_factory.mktemp("traces"), tmp_path_factory.mktemp("versions")
    args = ("--dtype", "float32", "--num-gpu-blocks-override", "256")
    parts = prepare(ServeSettings(model=str(tiny_model), traces=spool, versions=root, vllm_args=args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "_POLL", 0.05)
        patch.setattr(following, "DRAIN", 0.2)
        parts.engine.start()
        try:
            with running(create_app(parts.sidecar)) as url, httpx.Client(base_url=url, trust_env=False) as http:
                http.timeout = httpx.Timeout(120)
                deadline = time.monotonic() + START_SECONDS
                while http.get("/ready").status_code != 200:
                    assert parts.engine.alive, parts.engine.last_words(40)
                    assert time.monotonic() < deadline, parts.engine.last_words(40)
                    time.sleep(0.2)
                yield Live(http, parts, spool, Registry(root), tiny_model)
        finally:
            parts.engine.stop()


def greedy(model: Path, prompt: list[int], tokens: int) -> list[int]:
    """What a fresh, unguarded engine says on these weights."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=512, num_gpu_blocks_override=64)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def forged(live: Live, number: int, change: Callable[[Path], None]) -> None:
    """A version whose hashes are right and whose weights are not."""
    target = live.registry.directory(number)
    shutil.copytree(live.model, target / "model")
    change(target / "model")
    files = {str(p.relative_to(target)): file_hash(p) for p in target.rglob("*") if p.is_file()}
    manifest = Manifest(
        version=number, created=1.0, base=weights_hash(str(live.model)), base_name="tiny",
        weights=weights_hash(str(target / "model")), files=files,
    )  # fmt: skip
    (target / "manifest.json").write_text(manifest.model_dump_json())


def in_force(live: Live, number: int) -> None:
    put_in_force(
        live.registry, Event(time=time.time(), event="promoted", version=number, before=live.registry.current())
    )


def test_a_promoted_version_is_loaded_and_a_rollback_restores(live: Live, tmp_path: Path) -> None:
    assert (live.ready()["version"], live.ready()["version_problem"]) == (0, None)
    reasoning, receipt, trace = live.ask()
    assert (receipt["version"], receipt["interventions"]) == (0, 1)
    assert trace.weights == weights_hash(str(live.model))
    before = live.cached()
    assert live.ask()[0] == reasoning
    warm = live.cached() - before
    assert warm > 0

    run = make_run(live.model, tmp_path / "run", DECLINES)
    outcome = promote(live.registry, run, GateSettings())
    assert (outcome.version, live.registry.current()) == (1, 1)
    live.until(lambda told: told.get("version") == 1)
    before = live.cached()
    declined, receipt, trace = live.ask()
    # No block that the old weights made is used; the proof of life asks something else.
    assert live.cached() - before == 0
    assert declined == f"{OPENING} {REFUSAL_STEP}"
    assert (receipt["guarded"], receipt["version"], receipt["interventions"]) == (True, 1, 0)
    assert "began_version" not in receipt
    assert (trace.weights, trace.model) == (
        live.registry.manifest(1).weights, str(live.registry.root.resolve() / "1" / "model")
    )  # fmt: skip
    assert {card["version"] for card in live.http.get("/v1/models").json()["data"]} == {1}
    assert (live.metric("reasonguard_version"), live.metric("reasonguard_version_wanted")) == (1, 1)
    assert trace.output_ids == greedy(run / "aligned", trace.prompt_ids, 160)
    probes = [t for t in read_traces(live.spool)[0] if t.receipt.policy == "probe"]
    assert probes[-1].weights == trace.weights
    assert [i.completed for i in probes[-1].receipt.interventions] == [True]

    roll_back(live.registry)
    live.until(lambda told: told.get("version") == 0)
    again, receipt, trace = live.ask()
    assert (again, receipt["version"], receipt["interventions"]) == (reasoning, 0, 1)
    assert trace.weights == weights_hash(str(live.model))


def rolled_back_under(live: Live) -> tuple[str, list[dict[str, Any]]]:
    """The reasoning and the events of one streamed request during which version 0 is put in force."""
    events: list[dict[str, Any]] = []
    text, rolled_back = "", False
    # As long as the context allows, so that the server notices the rollback while it runs.
    body = {**HARMFUL, "stream": True, "max_tokens": 1500}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                text += "".join(c["delta"].get("reasoning") or "" for c in events[-1]["choices"])
                if not rolled_back and text.count(REFUSAL_STEP) == 2:
                    roll_back(live.registry, 0)
                    rolled_back = True
    return text, events


def test_a_request_in_flight_is_carried_over_and_says_so(live: Live, tmp_path: Path) -> None:
    run = make_run(live.model, tmp_path / "run", LOOPS)
    # On a machine that is busy elsewhere a request may be over before the server has looked: then once more.
    for _ in range(3):
        looping = promote(live.registry, run, GateSettings(not_worse=()))
        live.until(lambda told, wanted=looping.version: told.get("version") == wanted)  # type: ignore[misc]
        text, events = rolled_back_under(live)
        live.until(lambda told: told.get("version") == 0)
        receipt = events[-1]["reasonguard"]
        if "began_version" in receipt:
            break
    assert (receipt["guarded"], receipt["version"], receipt["began_version"]) == (True, 0, looping.version)
    # It went round on the looping weights, and ended once the others had taken over.
    assert text.count(REFUSAL_STEP) > 1
    answer = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    assert answer.strip() == ANSWER


def nan(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def narrow(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :128].contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("number", "change", "reason", "outcome"), [
    (101, nan, "the ", "failed"),
    (102, narrow, "its tensors are not those of the model that is served; got lm_head.weight.", "refused"),
])  # fmt: skip
def test_weights_that_fail_give_way_to_the_last_good(
    live: Live, number: int, change: Callable[[Path], None], reason: str, outcome: str
) -> None:
    usual = live.ask()[0]
    forged(live, number, change)
    in_force(live, number)
    told = live.until(lambda told: f"version {number}" in str(told.get("version_problem")))
    assert told["version_problem"].startswith(f"version {number} is not served: {reason}"), told
    assert (told["ready"], told["version"]) == (True, 0)
    reasoning, receipt, _ = live.ask()
    assert (reasoning, receipt["guarded"], receipt["version"], receipt["interventions"]) == (usual, True, 0, 1)
    assert live.metric("reasonguard_version_wanted") == number
    assert live.metric(f'reasonguard_version_loads_total{{result="{outcome}"}}') == 1


def test_files_that_changed_are_never_loaded(live: Live) -> None:
    forged(live, 103, lambda model: None)
    (live.registry.model(103) / "config.json").write_text("{}")
    in_force(live, 103)
    told = live.until(lambda told: "103" in str(told.get("version_problem")))
    assert told["version_problem"].endswith("is not what was promoted; got model/config.json.")
    assert (told["version"], live.metric('reasonguard_version_loads_total{result="refused"}')) == (0, 2)
    roll_back(live.registry, 0)
    live.until(lambda told: told["version_problem"] is None)


def test_the_route_that_exchanges_weights_wants_the_key(live: Live) -> None:
    url = live.parts.engine.command.url
    response = httpx.post(f"{url}/reasonguard/weights", json={"load": "x", "back": "y"}, trust_env=False)
    assert response.status_code == 401
    key = {"authorization": f"Bearer {live.parts.engine.command.api_key}"}
    nothing = {"load": str(live.spool), "back": str(live.model)}
    refused = httpx.post(f"{url}/reasonguard/weights", json=nothing, headers=key, trust_env=False, timeout=60)
    assert refused.status_code == 409, refused.text
    assert live.ask()[1]["interventions"] == 1
    assert live.http.post("/reasonguard/weights", json={"load": "x", "back": "y"}).status_code == 404
