"""An engine that dies is started again, proven again, and given up at some point. Its process is a real one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from guard.engine.launch import Engine, EngineCommand, free_port
from guard.errors import UserError
from guard.runtime import GuardRuntime
from guard.sidecar import keeper as keeper_module
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.keeper import Keeper
from guard.sidecar.metrics import Metrics
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.upstream import Upstream
from guard.sidecar.versions import Served, Versions
from guard.traces import Spool
from guard.weights import Registry
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.test_sidecar import HELLO

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "FIRST_PAUSE", 0.01)


@dataclass
class Kept:
    """A sidecar whose engine is a process."""

    engine: Engine
    sidecar: Sidecar
    http: httpx.Client
    lost: list[bool] = field(default_factory=list)

    def chat(self) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=HELLO)

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def kill(self) -> None:
        """Returns once the process is gone."""
        before = self.engine.pid
        assert before is not None
        os.killpg(before, signal.SIGKILL)
        _until(lambda: not self.engine.alive or self.engine.pid != before, self)


@pytest.fixture
def kept(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Iterator[Kept]:
    trigger, port = runtime.triggers[0], free_port()
    argv = (sys.executable, "-m", "tests.guard.sidecar.scripted_process", "--port", str(port), str(tmp_path), "-")
    argv += (runtime.detector.version, trigger.id, json.dumps(list(trigger.spaced)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    engine = Engine(EngineCommand(argv, env, f"http://127.0.0.1:{port}", "key"), tmp_path / "engine.log")
    sidecar = build_sidecar(
        runtime, neutraliser, Upstream(engine.command.url, "key"), SpoolFollower(tmp_path), secret="s",
        alive=lambda: engine.alive, spool=Spool(tmp_path), served_name="scripted", allow_seed=True,
    )  # fmt: skip
    sidecar.keeper = Keeper(engine, sidecar.probe, None, sidecar.metrics, 2)
    lost: list[bool] = []
    engine.start()
    try:
        app = create_app(sidecar, on_lost=lambda: lost.append(True))
        with running(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            yield Kept(engine, sidecar, http, lost)
    finally:
        engine.stop()


def test_a_killed_engine_comes_back_is_proven_anew_and_at_last_given_up(kept: Kept) -> None:
    _until(kept.is_ready, kept)
    assert kept.chat().json()["reasonguard"]["guarded"] is True
    for restarts in (1, 2):
        before = kept.engine.pid
        kept.kill()
        assert kept.http.get("/health").status_code == 200
        refused = kept.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) in (
            (503, "engine_unavailable"),
            (503, "not_ready"),
        )
        _until(kept.is_ready, kept)
        assert kept.engine.pid != before
        assert kept.chat().json()["reasonguard"]["guarded"] is True
        assert kept.sidecar.metrics.registry.get_sample_value("reasonguard_engine_restarts_total") == restarts
    assert not kept.lost
    kept.kill()
    _until(lambda: kept.lost == [True], kept)
    assert kept.http.get("/health").status_code == 503
    assert kept.http.get("/ready").json() == {"ready": False, "reason": "the engine has stopped"}


@dataclass
class Fragile:
    """Counts its starts, of which the first so many fail."""

    failures: int = 0
    starts: int = 0

    def start(self) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise UserError("no log")

    def stop(self) -> None:
        """Nothing is left of it."""


def keeping(sidecar: Sidecar, engine: Fragile, most: int, *, proven: bool = True) -> Keeper:
    sidecar.probe.proven = proven
    return Keeper(engine, sidecar.probe, sidecar.versions, Metrics(), most)


@pytest.fixture
def sidecar(runtime: GuardRuntime, neutraliser: Neutraliser, tmp_path: Path) -> Sidecar:
    return build_sidecar(
        runtime, neutraliser, Upstream("http://127.0.0.1:9", "key"), SpoolFollower(tmp_path), secret="s",
        alive=lambda: False, spool=Spool(tmp_path), served_name="x", allow_seed=True,
    )  # fmt: skip


def test_an_engine_that_was_never_proven_is_not_started_again(sidecar: Sidecar) -> None:
    engine = Fragile()
    keeper = keeping(sidecar, engine, 5, proven=False)
    assert asyncio.run(keeper.start_again()) is False
    assert (engine.starts, keeper.trying) == (0, False)


def test_a_start_that_fails_is_tried_again_up_to_the_limit(sidecar: Sidecar) -> None:
    assert asyncio.run(keeping(sidecar, Fragile(failures=2), 3).start_again()) is True
    engine = Fragile(failures=3)
    assert asyncio.run(keeping(sidecar, engine, 3).start_again()) is False
    assert engine.starts == 3
    assert asyncio.run(keeping(sidecar, Fragile(), 0).start_again()) is False


def test_what_was_proven_counts_no_more(sidecar: Sidecar) -> None:
    keeper = keeping(sidecar, Fragile(), 1)
    assert asyncio.run(keeper.start_again()) is True
    assert (sidecar.probe.proven, sidecar.probe.reason) == (False, "the engine has stopped, and is started again")
    # It served before, so a death without a proof since then counts as one more.
    assert asyncio.run(keeper.start_again()) is False


def test_a_long_life_is_forgiven(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "FORGIVEN", -1)
    keeper = keeping(sidecar, Fragile(), 1)
    assert [asyncio.run(keeper.start_again()) for _ in range(3)] == [True, True, True]


def test_a_new_engine_starts_on_the_model_as_it_came(sidecar: Sidecar, tmp_path: Path) -> None:
    base = Served(0, "base", "w0")
    versions = Versions(Registry(tmp_path), base, sidecar.upstream, sidecar.probe, lambda: 0, sidecar.metrics)
    versions.serving, versions.settled, versions.broken = Served(3, "third", "w3"), True, "the engine cannot be reached"
    sidecar.probe.weights = "w3"
    sidecar.versions = versions
    assert asyncio.run(keeping(sidecar, Fragile(), 1).start_again()) is True
    assert (versions.serving, versions.settled, versions.broken) == (base, False, None)
    assert sidecar.probe.weights == "w0"
    assert sidecar.exchanging == "the version in force is being loaded."


def _until(condition: Callable[[], bool], kept: Kept, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, kept.engine.last_words(20)
        time.sleep(0.05)
