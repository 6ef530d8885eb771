"""Engines that run already: only substitution guards them, so who is unproven, dead or unfit answers nobody."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guard.errors import UserError
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.remote import prepare_remote, substituting
from guard.sidecar.remote_check import Offer, base_url, check_remote
from guard.sidecar.remote_probe import prove_substitution
from guard.sidecar.serve import ServeSettings
from guard.sidecar.tenants import Tenant
from guard.sidecar.upstream import Upstream
from guard.sidecar.upstreams import Upstreams
from guard.traces import read_traces
from tests.guard import kit
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.fronts import CHAT, HARMFUL, RemoteFront, until
from tests.guard.sidecar.scripted import ScriptedEngine
from tests.guard.sidecar.unguarded import Unguarded
from tests.tiny import ANSWER, CUE, OPENING, REFUSAL_STEP

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Start = Callable[..., RemoteFront]


def test_a_cue_is_substituted_and_the_receipt_says_that_nothing_else_guards(remotes: Start) -> None:
    front = remotes(1)
    status, answer = front.chat(temperature=0, seed=7)
    assert status == 200
    receipt, message = answer["reasonguard"], answer["choices"][0]["message"]
    trace = next(t for t in read_traces(front.spool)[0] if t.guard_id == receipt["guard_id"])
    (item,) = trace.receipt.interventions
    (trigger,) = (t for t in front.sidecar.runtime.triggers if t.id == item.trigger_id)
    assert message["reasoning"] == f"{OPENING} {trigger.text} {REFUSAL_STEP}"
    assert message["content"].strip() == ANSWER
    table = front.sidecar.runtime.table
    assert table.text(item.cue_ids).strip() == CUE
    assert (receipt["guarded"], receipt["mode"], receipt["engine"], receipt["upstream"]) == (
        True, "substitute", "sidecar-only", 1,
    )  # fmt: skip
    assert receipt["replaced_tokens"] == len(item.cue_ids)
    # The mark that closes the reasoning, and the answer.
    closed = trace.output_ids.index(front.engines[0].tokenizer.token_to_id("</think>"))
    assert (receipt["zones"], receipt["unwatched_tokens"]) == (["reasoning"], len(trace.output_ids) - closed)
    assert trace.guard_time is not None
    assert len(trace.guard_time.steps) == receipt["seen"]
    assert trace.guard_time.request > 0
    first, again = front.engines[0].asked[-2:]
    assert (first["seed"], first["return_token_ids"], "vllm_xargs" in first) == (7, True, False)
    assert CUE not in table.text(again["prompt"])


def test_a_request_that_cannot_be_held_back_is_refused(remotes: Start) -> None:
    front = remotes(1)
    asked = len(front.engines[0].asked)
    status, answer = front.chat(stop=["zebra"])
    sentence = (
        "`stop`: stop strings are found by the engine, in text that may be taken back, and the engine has no guard of "
        "its own that could inject instead."
    )
    assert (status, answer["error"]["message"], answer["error"]["code"]) == (400, sentence, "refused_parameter")
    assert front.chat(logprobs=True, top_logprobs=2)[0] == 400
    assert len(front.engines[0].asked) == asked, "nothing of it reached the engine"


def test_the_least_loaded_engine_takes_the_next_request(remotes: Start) -> None:
    front = remotes(2)
    front.engines[0].hold = hold = threading.Event()
    with front.http.stream("POST", CHAT, json={**HARMFUL, "stream": True}) as response:
        # A dropped iterator would close the stream.
        lines = response.iter_lines()
        next(lines)
        assert [len(r.holding) for r in front.upstreams.remotes] == [1, 0]
        assert 'reasonguard_upstream_requests_in_flight{upstream="1"} 1.0' in front.http.get("/metrics").text
        try:
            taken = [front.http.post(CHAT, json=HARMFUL, timeout=5).json()["reasonguard"] for _ in range(3)]
        finally:
            hold.set()
        assert [receipt["upstream"] for receipt in taken] == [2, 2, 2]
        assert json.loads([line for line in lines if line][-2][6:])["reasonguard"]["upstream"] == 1
    until(lambda: [len(r.holding) for r in front.upstreams.remotes] == [0, 0])


def test_equals_take_turns(remotes: Start) -> None:
    front = remotes(2)
    assert [front.chat()[1]["reasonguard"]["upstream"] for _ in range(4)] == [1, 2, 1, 2]


def test_an_engine_that_is_not_well_leaves_and_returns_after_a_probe(remotes: Start) -> None:
    front = remotes(2)
    front.engines[0].well = False
    front.wait({"1": "it does not answer /health", "2": "ok"})
    assert [front.chat()[1]["reasonguard"]["upstream"] for _ in range(2)] == [2, 2]
    page = front.http.get("/metrics").text
    assert 'reasonguard_upstream_up{upstream="1"} 0.0' in page
    assert 'reasonguard_upstream_up{upstream="2"} 1.0' in page
    asked = len(front.engines[0].asked)
    front.engines[0].well = True
    front.wait({"1": "ok", "2": "ok"})
    probe, again = front.engines[0].asked[asked:]
    assert again["prompt"][: len(probe["prompt"])] == probe["prompt"]
    assert len(again["prompt"]) > len(probe["prompt"]), "it went on from the trigger"
    assert {front.chat()[1]["reasonguard"]["upstream"] for _ in range(2)} == {1, 2}


def test_a_request_whose_engine_dies_is_503_and_the_engine_is_out(remotes: Start) -> None:
    front = remotes(2)
    front.engines[0].break_after = 2
    status, answer = front.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert "reasonguard" not in answer
    until(lambda: front.upstreams.remotes[0].reason is not None)
    assert front.chat()[1]["reasonguard"]["upstream"] == 2
    front.engines[0].break_after = None
    front.wait({"1": "ok", "2": "ok"})


@pytest.mark.parametrize("how", ["break_after", "ends_after"])
def test_a_stream_whose_engine_breaks_off_ends_with_the_error(remotes: Start, how: str) -> None:
    front = remotes(1)
    setattr(front.engines[0], how, 2)
    *_, last = front.events()
    assert (last["error"]["code"], last["error"]["type"]) == ("engine_unavailable", "server_error")
    assert last["choices"] == []
    assert "finish_reason" not in json.dumps(last)


def test_an_engine_that_is_gone_leaves_and_no_engine_is_503(remotes: Start) -> None:
    front = remotes(2)
    front.stops[0].close()
    front.wait({"1": "it does not answer /health", "2": "ok"})
    assert front.chat()[0] == 200
    assert front.http.get("/ready").json()["upstreams"] == {"1": "it does not answer /health", "2": "ok"}
    front.stops[1].close()
    front.wait(dict.fromkeys("12", "it does not answer /health"))
    reason = "no upstream takes requests: 1: it does not answer /health; 2: it does not answer /health"
    ready = front.http.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": reason})
    status, answer = front.chat()
    assert (status, answer["error"]["message"]) == (503, f"The guard has not been proven to work: {reason}.")
    assert front.http.get("/v1/models").status_code == 503
    assert front.http.get("/health").status_code == 200, "the sidecar itself is well"


@pytest.mark.parametrize("found", [None, "it says the cue"])
def test_all_who_ask_once_a_proof_is_old_share_one_probe(runtime: GuardRuntime, found: str | None) -> None:
    probes = 0

    async def prove(_: Upstream, __: GuardRuntime) -> str | None:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0.01)
        return found

    async def asked() -> list[str | None]:
        ours = Upstreams([Upstream("http://127.0.0.1:9", "")], Tenant("", runtime), prove)
        ours.remotes[0].reason = None
        return await asyncio.gather(*(ours.ready() for _ in range(20)))

    answers = asyncio.run(asked())
    assert (probes, len(set(answers)), answers[0] is None) == (1, 1, found is None)


def test_fail_mode_open_opens_no_unproven_engine(remotes: Start) -> None:
    front = remotes(1, fail_mode="open")
    front.engines[0].gives_ids = False
    front.engines[0].well = False
    front.wait({"1": "it does not answer /health"})
    front.engines[0].well = True
    front.wait({"1": "The engine gave text without its token ids."})
    status, answer = front.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")


def test_an_engine_that_does_not_go_on_from_a_trigger_is_not_proven(
    runtime: GuardRuntime, tokenizer: Tokenizer
) -> None:
    engine = Unguarded(tokenizer, ends_after=1)

    async def proven(url: str) -> str | None:
        client = Upstream(url, "")
        try:
            return await prove_substitution(client, replace(runtime, eos=2))
        finally:
            await client.close()

    class Broken(type(runtime.detector)):  # type: ignore[misc]
        def request(self, *messages: str) -> Any:
            raise ValueError("torn")

    with running(engine.app()) as url:
        with pytest.raises(Exception, match="broke off"):
            asyncio.run(proven(url))
        engine.ends_after = None
        assert asyncio.run(proven(url)) is None
        broken = Broken.__new__(Broken)
        broken.__dict__ = runtime.detector.__dict__
        runtime = replace(runtime, detector=broken)
        assert asyncio.run(proven(url)) == "the guard failed on the probe: request: ValueError: torn"


Misfit = tuple[dict[str, Any], str]


@pytest.mark.parametrize(("changes", "message"), [
    ({"gives_ids": False}, "does not continue token ids"),
    ({"refuses_key": True}, "refuses the key; got HTTP 401. Put it into REASONGUARD_UPSTREAM_KEY"),
    ({"tokenizer": kit.tokenizer()}, "has another tokenizer than --model: "),
])  # fmt: skip
def test_an_engine_that_cannot_be_guarded_is_named_at_the_start(
    tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    engine = Unguarded(tokenizer)
    for name, value in changes.items():
        setattr(engine, name, value)
    with running(engine.app()) as url, pytest.raises(UserError) as caught:
        prepare_remote(ServeSettings(str(tiny_model), tmp_path, upstreams=(url,)))
    assert f"Upstream {url} " in str(caught.value)
    assert message in str(caught.value)


def test_no_tokenize_and_no_answer_are_named(tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = ScriptedEngine(tmp_path, lambda _: [])
    with running(other.app()) as url, pytest.raises(UserError, match="renders no chat as token ids"):
        prepare_remote(ServeSettings(str(tiny_model), tmp_path, upstreams=(url,)))
    with pytest.raises(UserError, match=r"No --upstream answers; got http://127.0.0.1:9: The eng.*\)\. Start"):
        prepare_remote(ServeSettings(str(tiny_model), tmp_path, upstreams=("http://127.0.0.1:9",)))
    with (
        running(Unguarded(tokenizer).app()) as one,
        running(Unguarded(tokenizer, model="big").app()) as two,
        pytest.raises(UserError, match=f"{two} serves another model than {one}; got big; wanted tiny"),
    ):
        prepare_remote(ServeSettings(str(tiny_model), tmp_path, upstreams=(one, two)))


def test_one_silent_engine_does_not_hinder_the_start_and_the_key_comes_from_the_environment(
    tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REASONGUARD_UPSTREAM_KEY", "k3y")
    engine = Unguarded(tokenizer)
    with running(engine.app()) as url:
        parts = prepare_remote(ServeSettings(str(tiny_model), tmp_path, upstreams=("http://127.0.0.1:9", f"{url}/v1/")))
    assert engine.keys == {"Bearer k3y"}
    assert parts.engine is None
    assert (parts.sidecar.policy.mode, parts.sidecar.served_name, parts.sidecar.aside) == ("substitute", "tiny", {})


def test_settings_that_do_not_go_with_upstreams_are_refused(tmp_path: Path) -> None:
    for given in ({"vllm_args": ("--seed", "1")}, {"versions": tmp_path}):
        settings = ServeSettings("x", tmp_path, upstreams=("http://127.0.0.1:9",), **given)
        with pytest.raises(UserError, match="and --upstream do not go together"):
            prepare_remote(settings)
    with pytest.raises(UserError, match="so a cue can only be substituted; got inject; wanted substitute"):
        substituting(Policy(mode="inject"))
    assert substituting(Policy(threshold=0.5)) == Policy(threshold=0.5, mode="substitute")


@pytest.mark.parametrize("url", [
    "10.0.0.7:8000", "ftp://a", "http://", "http://a?b=c", "http://[::1", "http://a:b", "http://a:99999", "http://a b",
    "http://\u2100.com",
])  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="--upstream is no URL of an engine"):
        base_url(url)


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        base_url("http://me:hunter2@host:8000")
    assert "hunter2" not in str(caught.value)
    assert base_url("https://host/gate/v1/") == "https://host/gate"


def test_the_check_names_the_model(tokenizer: Tokenizer) -> None:
    async def offered(url: str) -> Offer:
        client = Upstream(url, "")
        try:
            return await check_remote(client, url, tokenizer)
        finally:
            await client.close()

    engine = Unguarded(tokenizer)
    engine.cards = [{"id": "alias", "root": "/m"}, {"id": "adapter", "parent": "tiny"}, {"id": "other", "root": "/o"}]
    with running(engine.app()) as url:
        assert asyncio.run(offered(url)) == Offer("tiny", frozenset({"tiny", "alias", "adapter"}))
    assert engine.keys == {None}
