"""The feeder beside a real HTTP sidecar: a store that is down, late or too new never stops a response."""

from __future__ import annotations

import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from guard.errors import UserError
from guard.sidecar import feeder as feeder_module
from guard.sidecar.feeder import Feeder
from guard.sidecar.metrics import Metrics
from guard.store import store as store_module
from guard.store.reading import count, read
from guard.store.store import Store
from guard.traces import Spool
from tests.guard.sidecar import test_sidecar
from tests.guard.sidecar.test_sidecar import HELLO, Front, Start
from tests.guard.store.conftest import Server, new_server
from tests.guard.store.kit import variant

start = test_sidecar.start


def value(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(f"reasonguard_store_{name}")
    assert found is not None
    return found


def soon(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder_module, "IDLE", 0.05)


def test_traces_arrive_while_it_runs_and_the_last_ones_at_its_end(tmp_path: Path) -> None:
    spool, metrics, url = Spool(tmp_path), Metrics(), f"sqlite:///{tmp_path}/store.db"
    for i in range(40):
        spool.append(variant(f"g{i:02}"))
    feeder = Feeder(tmp_path, url, metrics)
    feeder.open()
    store = Store.open(url)
    with feeder:
        soon(lambda: count(store) == 40)
        with next(tmp_path.glob("spool-*.jsonl")).open("ab") as out:
            out.write(b"{torn\n")
        soon(lambda: value(metrics, "malformed_lines_total") == 1)
        soon(lambda: value(metrics, "behind_bytes") == 0)
        for i in range(40, 80):
            spool.append(variant(f"g{i:02}"))
    assert [trace.guard_id for trace in read(store)] == [f"g{i:02}" for i in range(80)]
    assert (value(metrics, "up"), value(metrics, "traces_total"), value(metrics, "failures_total")) == (1, 80, 0)
    assert feeder.problem is None
    store.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A Postgres that a test may stop."""
    directory = Path(tempfile.mkdtemp(prefix="reasonguard-postgres-"))
    try:
        started = new_server(directory)
        try:
            yield started
        finally:
            started.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def ask(front: Front) -> None:
    """A guarded response, unary and streamed."""
    assert front.http.post("/v1/chat/completions", json=HELLO).json()["reasonguard"]["guarded"] is True
    assert front.events()[-1]["reasonguard"]["guarded"] is True


def test_responses_do_not_wait_for_a_store_that_hangs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_CONNECT_SECONDS", 60)
    front = start()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"postgresql://guard@127.0.0.1:{mute.getsockname()[1]}/db"
        with Feeder(tmp_path, url, front.sidecar.metrics) as feeder:
            soon(lambda: select.select([mute], [], [], 0)[0] != [])
            waiting, _ = mute.accept()
            ask(front)
            # They came while the feeder was waiting for its first connection, as it still is.
            assert value(front.sidecar.metrics, "failures_total") == 0
            mute.close()
            waiting.close()
            soon(lambda: feeder.problem is not None)


def test_a_store_that_is_down_stops_no_response_and_catches_up(start: Start, tmp_path: Path, server: Server) -> None:
    front = start()
    metrics, url = front.sidecar.metrics, server.database()
    server.stop()
    feeder = Feeder(tmp_path, url, metrics)
    feeder.open()
    assert feeder.problem is not None
    with feeder:
        ask(front)
        soon(lambda: value(metrics, "failures_total") > 1)
        assert value(metrics, "up") == 0
        size = next(tmp_path.glob("spool-*.jsonl")).stat().st_size
        soon(lambda: value(metrics, "behind_bytes") == size)
        server.start()
        soon(lambda: value(metrics, "up") == 1 and value(metrics, "traces_total") == 2)
        server.stop()
        ask(front)
        soon(lambda: value(metrics, "up") == 0)
        server.start()
        soon(lambda: value(metrics, "traces_total") == 4)
        assert value(metrics, "behind_bytes") == 0
    store = Store.open(url)
    assert count(store) == 4
    store.close()


def test_a_store_that_was_migrated_by_newer_code_is_left_alone(start: Start, tmp_path: Path) -> None:
    front = start()
    metrics, url = front.sidecar.metrics, f"sqlite:///{tmp_path}/store.db"
    feeder = Feeder(tmp_path, url, metrics)
    feeder.open()
    store = Store.open(url)
    with feeder:
        ask(front)
        soon(lambda: count(store) == 2)
        with store.engine.begin() as connection:
            connection.execute(text("UPDATE reasonguard_version SET version_num = '0999'"))
        ask(front)
        soon(lambda: value(metrics, "up") == 0)
        assert "newer version of Reasonguard" in str(feeder.problem)
    assert count(store) == 2
    store.close()
    with pytest.raises(UserError, match="newer version of Reasonguard"):
        Feeder(tmp_path, url, Metrics()).open()


def test_a_url_that_is_none_stops_serve_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Feeder(tmp_path, "nonsense", Metrics()).open()
