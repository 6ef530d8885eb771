"""Keys, their policies and quotas, and reloads before engines that run already: the sidecar applies them itself."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from classifiers.artifact import MANIFEST_FILE
from classifiers.detector import DEFAULT
from guard.errors import UserError
from guard.keys import hash_of
from guard.policy import Policy
from guard.sidecar.admin import RELOAD
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar
from guard.sidecar.remote import prepare_remote
from guard.sidecar.serve import ServeSettings
from guard.traces import read_traces
from guard.triggers import POOL
from tests.guard.sidecar.fronts import CHAT, HARMFUL, until
from tests.guard.sidecar.serving import running
from tests.guard.sidecar.unguarded import Unguarded
from tests.tiny import CUE, OPENING, PLAN, REFUSAL_STEP

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROOT = Path(__file__).parents[3]
TOKEN = "an-operators-token"
TEXTS = {trigger.id: trigger.text for trigger in POOL}


@dataclass
class Files:
    """What an operator writes."""

    directory: Path

    @property
    def keys(self) -> Path:
        return self.directory / "keys.yaml"

    @property
    def policy(self) -> Path:
        return self.directory / "policy.yaml"

    @property
    def detector(self) -> Path:
        return self.directory / "detector"

    @property
    def token(self) -> Path:
        return self.directory / "token"

    def write(self, policy: dict[str, Any], **keys: dict[str, Any]) -> None:
        """A policy for everyone and one a key; `quotas` among a key's settings are the key's."""
        self.token.write_text(TOKEN)
        self.policy.write_text(yaml.safe_dump(policy))
        entries = []
        for name, own in keys.items():
            quotas = own.pop("quotas", {})
            (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(own))
            entries.append({"name": name, "hash": hash_of(f"rg-{name}"), "policy": f"{name}.yaml", "quotas": quotas})
        self.keys.write_text(yaml.safe_dump({"keys": entries}))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "etc").mkdir()
    return Files(tmp_path / "etc")


@dataclass
class Front:
    """`serve --upstream URL --keys ...` without its process."""

    engine: Unguarded
    sidecar: Sidecar
    http: httpx.Client
    files: Files
    spool: Path

    def chat(self, name: str) -> httpx.Response:
        return self.http.post(CHAT, json=HARMFUL, headers={"authorization": f"Bearer rg-{name}"})

    def reload(self) -> tuple[int, dict[str, Any]]:
        response = self.http.post(RELOAD, headers={"authorization": f"Bearer {TOKEN}"})
        return response.status_code, response.json()


@pytest.fixture
def front(tiny_model: Path, tokenizer: Tokenizer, files: Files, tmp_path: Path) -> Iterator[Front]:
    files.write({}, a={"name": "one", "triggers": ["victim"]}, b={"name": "watched", "shadow": True})
    shutil.copytree(DEFAULT, files.detector)
    engine, spool = Unguarded(tokenizer), tmp_path / "traces"
    with contextlib.ExitStack() as stack:
        settings = ServeSettings(
            str(tiny_model), spool, files.policy, files.detector, keys=files.keys, admin_token_file=files.token,
            upstreams=(stack.enter_context(running(engine.app())),),
        )  # fmt: skip
        parts = prepare_remote(settings)
        stack.enter_context(parts.feeder)
        url = stack.enter_context(running(create_app(parts.sidecar)))
        http = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
        until(lambda: http.get("/ready").status_code == 200)
        yield Front(engine, parts.sidecar, http, files, spool)


def substituted(**policy: Any) -> str:
    return Policy(mode="substitute", **policy).hash


def test_each_key_has_its_policy_and_its_name_is_in_the_traces(front: Front) -> None:
    assert front.http.post(CHAT, json=HARMFUL).status_code == 401
    assert front.chat("none").status_code == 401
    wanted = {
        "a": (f"{OPENING} {TEXTS['victim']} {REFUSAL_STEP}", substituted(name="one", triggers=["victim"]), True),
        "b": (f"{OPENING} {CUE} {' '.join(PLAN)}", substituted(name="watched", shadow=True), False),
    }
    for name, (said, policy, guarded) in wanted.items():
        answer = front.chat(name).json()
        receipt = answer["reasonguard"]
        assert answer["choices"][0]["message"]["reasoning"] == said
        assert (receipt["policy_hash"], receipt["guarded"], receipt["engine"]) == (policy, guarded, "sidecar-only")
        trace = next(t for t in read_traces(front.spool)[0] if t.guard_id == receipt["guard_id"])
        assert (trace.tenant, trace.receipt.policy_hash) == (name, policy)


def test_a_request_and_its_re_entries_share_a_salt_that_no_other_key_has(front: Front) -> None:
    salts = []
    for name in ("a", "b"):
        asked = len(front.engine.asked)
        assert front.chat(name).status_code == 200
        salts.append([body["cache_salt"] for body in front.engine.asked[asked:]])
    (first, again), (other,) = salts
    assert first == again != other
    assert len(first) == len(other) == 64


def test_a_reload_proves_what_is_new_on_the_engine_and_puts_it_in_force(front: Front) -> None:
    front.files.write({"name": "new"}, c={"name": "two", "triggers": ["danger"]})
    asked = len(front.engine.asked)
    status, answer = front.reload()
    keys = {"c": substituted(name="two", triggers=["danger"])}
    assert (status, answer["problem"], answer["keys"]) == (200, None, keys)
    assert answer["policy_hash"] == substituted(name="new")
    assert len(front.engine.asked) == asked + 4, "two policies, each with a cue and what follows its trigger"
    assert front.sidecar.probe.tenant.policy.name == "new"
    assert front.chat("a").status_code == 401
    message = front.chat("c").json()["choices"][0]["message"]
    assert message["reasoning"] == f"{OPENING} {TEXTS['danger']} {REFUSAL_STEP}"


def test_another_detector_decides_from_the_next_request_on(front: Front) -> None:
    manifest = front.files.detector / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"threshold": 0.0}))
    front.files.write({}, a={"ladder": ["trigger"], "triggers": ["victim"]})
    assert front.reload()[0] == 200
    reasoning = front.chat("a").json()["choices"][0]["message"]["reasoning"]
    # Every step is a cue now, so the very first one is replaced.
    assert reasoning == f"{TEXTS['victim']} {REFUSAL_STEP}"


def test_what_cannot_work_or_is_not_proven_changes_nothing(front: Front) -> None:
    before = front.sidecar.rules
    only = "the engines at --upstream have no guard of ours, so a cue can only be substituted"
    front.files.write({}, a={"mode": "inject"})
    status, answer = front.reload()
    problem = f"The policy of key a, key `mode`: {only}; got inject; wanted substitute."
    assert (status, answer["problem"]) == (409, problem)
    front.files.write({"name": "new"})
    front.engine.gives_ids = False
    status, answer = front.reload()
    assert (status, answer["problem"]) == (409, "The engine gave text without its token ids.")
    assert front.sidecar.rules == before
    front.engine.gives_ids = True
    front.engine.well = False
    until(lambda: not front.sidecar.probe.proven)
    status, answer = front.reload()
    assert (status, answer["problem"]) == (
        409,
        f"policy new {substituted(name='new')} was not proven: no upstream takes requests: "
        "1: it does not answer /health",
    )
    assert front.chat("a").status_code == 503


def test_quotas_count_what_the_sidecar_watched(front: Front) -> None:
    front.files.write({}, a={"quotas": {"tokens_per_day": 20}})
    assert front.reload()[0] == 200
    assert front.chat("a").status_code == 200
    until(lambda: front.chat("a").status_code == 429)
    assert front.chat("a").json()["error"]["message"] == "This key's 20 tokens per day are used up."


def test_a_key_whose_policy_injects_stops_the_start(tiny_model: Path, files: Files, tmp_path: Path) -> None:
    files.write({}, a={"mode": "inject"})
    settings = ServeSettings(str(tiny_model), tmp_path, keys=files.keys, upstreams=("http://127.0.0.1:9",))
    with pytest.raises(UserError, match=r"^The policy of key a, key `mode`: the engines at --upstream have no guard"):
        prepare_remote(settings)


def test_sighup_reloads_a_serve_before_upstreams(
    tiny_model: Path, tokenizer: Tokenizer, files: Files, tmp_path: Path
) -> None:
    files.write({}, a={"name": "one"})
    log = tmp_path / "log"
    with running(Unguarded(tokenizer).app()) as url, log.open("w") as output:
        command = [
            sys.executable, "cli.py", "serve", "--model", str(tiny_model), "--traces", str(tmp_path / "traces"),
            "--port", "0", "--upstream", url, "--keys", str(files.keys), "--policy", str(files.policy),
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stderr=output, start_new_session=True)
        try:
            until(lambda: "Ready: http://" in log.read_text(), 90)
            base = log.read_text().split("Ready: ")[1].split("/v1")[0]

            def status(name: str) -> int:
                headers = {"authorization": f"Bearer rg-{name}"}
                return httpx.post(f"{base}{CHAT}", json=HARMFUL, headers=headers, trust_env=False).status_code

            assert (status("a"), status("b")) == (200, 401)
            files.write({}, b={"name": "two"})
            process.send_signal(signal.SIGHUP)
            until(lambda: status("b") == 200)
            assert status("a") == 401
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
