"""Reloads over real HTTP and by a real signal, in front of an engine that proves what it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from classifiers.artifact import MANIFEST_FILE, fingerprint
from classifiers.detector import DEFAULT
from guard.engine.session import PROBE_POLICY
from guard.errors import UserError
from guard.keys import hash_of
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.admin import RELOAD, TOKEN_VARIABLE, Reloader, admin_token
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.rules import RulesReader, Sources
from guard.sidecar.serve import is_loopback
from guard.sidecar.upstream import Upstream
from guard.traces import Spool, Trace
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.scripted import ScriptedEngine, probe_trace

ROOT = Path(__file__).parents[3]
TOKEN = "an-operators-token"
AUTH = {"authorization": f"Bearer {TOKEN}"}


class Front:
    """A sidecar whose files a test changes; `applies` is the policy that the engine takes, None: what it is told."""

    def __init__(self, runtime: GuardRuntime, neutraliser: Neutraliser, directory: Path) -> None:
        self.files = directory / "etc"
        self.files.mkdir()
        self.applies: Policy | None = None
        self.probed: list[str] = []
        self.engine = ScriptedEngine(directory, self._probe)
        self.engine.hold.set()
        self._runtime, self._neutraliser, self._directory = runtime, neutraliser, directory
        self.sidecar: Sidecar
        self.http: httpx.Client

    @contextlib.contextmanager
    def serving(self) -> Iterator[Front]:
        with contextlib.ExitStack() as stack:
            upstream = Upstream(stack.enter_context(running(self.engine.app())), "key")
            self.sidecar = build_sidecar(
                self._runtime, self._neutraliser, upstream, SpoolFollower(self._directory), secret="s",
                alive=lambda: True, spool=Spool(self._directory), served_name="scripted", allow_seed=True,
            )  # fmt: skip
            self.sidecar.probe.proven = True
            self.write({}, [("a", "strict.yaml")])
            (self.files / "strict.yaml").write_text("name: strict\n")
            self.canary = shutil.copytree(DEFAULT, self.files / "canary")
            sources = Sources(
                self.files / "policy.yaml", None, self.files / "keys.yaml", self.files / "detectors", self.canary, 100
            )
            reader = RulesReader(sources, self._runtime)
            self.sidecar.adopt(reader.read())
            self.sidecar.reloader = Reloader(self.sidecar, reader, TOKEN)
            url = stack.enter_context(running(create_app(self.sidecar)))
            self.http = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
            yield self

    def write(self, policy: dict[str, Any], keys: list[tuple[str, str | None]]) -> None:
        (self.files / "policy.yaml").write_text(yaml.safe_dump(policy))
        entries = [
            {"name": name, "hash": hash_of(f"rg-{name}"), **({"policy": file} if file else {})} for name, file in keys
        ]
        (self.files / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))

    def reload(self) -> tuple[int, dict[str, Any]]:
        response = self.http.post(RELOAD, headers=AUTH)
        return response.status_code, response.json()

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def _probe(self, guard_id: str) -> list[Trace]:
        """A proof under the policy that the engine applies."""
        policy = self.applies or Policy.model_validate_json(self.engine.body["vllm_xargs"]["guard_policy"])
        self.probed.append(policy.name)
        trace = probe_trace(guard_id, policy, self._runtime)
        self.engine.tokens = trace.output_tokens
        return [trace]


@pytest.fixture
def front(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Iterator[Front]:
    with Front(runtime, neutraliser, tmp_path).serving() as found:
        yield found


def in_force(policy: Policy, **keys: Policy) -> dict[str, Any]:
    return {
        "policy": policy.name, "policy_hash": policy.hash, "keys": {n: p.hash for n, p in keys.items()},
    }  # fmt: skip


def test_a_reload_proves_what_is_new_and_puts_it_in_force(front: Front) -> None:
    strict, new = Policy(name="strict"), Policy(name="new", shadow=True)
    front.write({"name": "new", "shadow": True}, [("a", "strict.yaml"), ("b", None), ("c", "strict.yaml")])
    status, answer = front.reload()
    assert (status, answer["reloaded"], answer["problem"]) == (200, True, None)
    assert {k: answer[k] for k in ("policy", "policy_hash", "keys")} == in_force(new, a=strict, b=new, c=strict)
    assert front.probed == ["new"], "the engine knows the strict one already"
    assert front.sidecar.probe.tenant.policy == new
    assert front.sidecar.tenant("Bearer rg-c") is not None
    assert (front.metric("reasonguard_reload_ok"), front.metric("reasonguard_keys")) == (1, 3)
    assert front.metric('reasonguard_reloads_total{result="loaded"}') == 1


def test_a_bad_file_keeps_the_last_good_rules_and_says_so(front: Front) -> None:
    front.write({"treshold": 1}, [])
    status, answer = front.reload()
    assert (status, answer["reloaded"]) == (409, False)
    assert answer["problem"].startswith(f"Policy file {front.files / 'policy.yaml'}, key `treshold`: Extra inputs")
    assert {k: answer[k] for k in ("policy", "policy_hash", "keys")} == in_force(Policy(), a=Policy(name="strict"))
    assert front.sidecar.tenant("Bearer rg-a") is not None
    assert (front.metric("reasonguard_reload_ok"), front.metric("reasonguard_keys")) == (0, 1)
    assert front.metric('reasonguard_reloads_total{result="refused"}') == 1
    front.write({}, [])
    assert front.reload()[0] == 200
    assert (front.metric("reasonguard_reload_ok"), front.sidecar.tenant("Bearer rg-a")) == (1, None)


def test_a_new_canary_is_taken_over_and_a_bad_one_keeps_the_last_good(front: Front) -> None:
    manifest, first = front.canary / MANIFEST_FILE, fingerprint(DEFAULT)
    assert front.reload()[1]["canary"] == first
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"threshold": 0.125}))
    second = fingerprint(front.canary)
    status, answer = front.reload()
    assert (status, answer["canary"], answer["detector"]) == (200, second, front.sidecar.runtime.detector.version)
    assert front.probed == [], "what decides nothing needs no proof"
    (front.canary / "first.onnx").write_bytes(b"")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"threshold": 0.25}))
    status, answer = front.reload()
    assert (status, answer["canary"]) == (409, second)
    assert "canary/first.onnx is damaged" in answer["problem"]
    canary = front.sidecar.comparer.canary
    assert canary is not None
    assert (canary.fingerprint, canary.detector.threshold) == (second, 0.125)
    assert front.metric("reasonguard_reload_ok") == 0


def test_rules_that_the_engine_does_not_take_are_not_in_force(front: Front) -> None:
    front.applies = Policy()
    new = Policy(name="new", threshold=0.25)
    front.write({"name": "new", "threshold": 0.25}, [])
    status, answer = front.reload()
    old, wanted = (each.model_copy(update=PROBE_POLICY).hash for each in (Policy(), new))
    problem = f"policy new {new.hash} was not proven: the engine probed under policy {old}, not {wanted}"
    assert (status, answer["problem"]) == (409, problem)
    assert front.sidecar.policy == Policy()


def test_an_engine_that_is_away_changes_nothing(front: Front) -> None:
    front.sidecar.probe._upstream = Upstream("http://127.0.0.1:9", "key")
    front.write({"name": "new"}, [])
    status, answer = front.reload()
    assert (status, answer["problem"]) == (409, "The engine cannot be reached (ClientConnectorError).")
    assert front.sidecar.policy == Policy()


def test_the_route_is_the_operators(front: Front) -> None:
    front.write({"name": "new"}, [])
    for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer rg-a"},
                    {"authorization": TOKEN}, {"authorization": "Bearer \u00ff".encode("latin-1")}):  # fmt: skip
        response = front.http.post(RELOAD, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_admin_token")
    assert front.http.get(RELOAD, headers=AUTH).status_code == 405
    assert front.sidecar.reloader is not None
    front.sidecar.reloader.token = None
    assert front.http.post(RELOAD, headers={"authorization": "Bearer None"}).status_code == 404
    assert front.sidecar.policy == Policy()


def test_what_was_asked_by_signal_is_done_soon(front: Front) -> None:
    front.write({"name": "new"}, [])
    assert front.sidecar.reloader is not None
    front.sidecar.probe.proven = False
    front.sidecar.reloader.soon()
    time.sleep(0.6)
    assert front.sidecar.policy.name == "default", "nothing is proven while the engine starts"
    front.sidecar.probe.proven = True
    _until(lambda: front.sidecar.policy.name == "new")


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert admin_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert admin_token(None) == "from-the-environment"
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert admin_token(path) == TOKEN
    path.write_text("short\n")
    with pytest.raises(UserError, match=f"^The admin token in {path} is too short; wanted at least 16 characters"):
        admin_token(path)
    with pytest.raises(UserError, match="cannot be read"):
        admin_token(tmp_path / "none")


@pytest.mark.parametrize(("host", "wanted"), [
    ("127.0.0.1", True), ("127.3.4.5", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("10.0.0.1", False), ("example.org", False),
])  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, wanted: bool) -> None:
    assert is_loopback(host) is wanted


SIGNALLED = """
import signal, sys, time
from guard.sidecar.signals import reload_by_signal
class Reloader:
    def soon(self):
        print("reload", file=out, flush=True)
def stop(number, frame):
    print("stop", file=out, flush=True)
    sys.exit(0)
out = open(sys.argv[1], "a")
signal.signal(signal.SIGTERM, stop)
with reload_by_signal(Reloader()):
    print("up", file=out, flush=True)
    while True:
        time.sleep(0.05)
"""


def test_sighup_reloads_without_a_terminal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, str(out)], start_new_session=True, cwd=ROOT)
    try:
        _until(lambda: out.exists() and out.read_text() == "up\n")
        process.send_signal(signal.SIGHUP)
        _until(lambda: out.read_text() == "up\nreload\n")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_sighup_reloads_at_a_terminal_and_ends_serve_when_that_is_closed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", SIGNALLED, str(out)])
    try:
        _until(lambda: out.exists() and out.read_text() == "up\n")
        os.kill(pid, signal.SIGHUP)
        _until(lambda: out.read_text() == "up\nreload\n")
        os.close(terminal)
        _until(lambda: out.read_text() == "up\nreload\nstop\n")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
