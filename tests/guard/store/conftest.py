"""Real databases: SQLite in a directory, Postgres from the system's packages, started here on a free port."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guard.engine.launch import free_port
from guard.store.store import Store

#: Postgres refuses to run as root; its package brings this user.
_ACCOUNT = "postgres"


@dataclass
class Server:
    """A Postgres cluster of its own."""

    bin: Path
    data: Path
    port: int
    account: str | None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it on its port, on the loopback interface only; nothing here needs to survive a power cut."""
        command = [
            self.bin / "postgres", "-D", self.data, "-p", str(self.port), "-k", self.data.parent,
            "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off",
        ]  # fmt: skip
        with (self.data.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self.account, cwd="/", preexec_fn=_die_with_the_tests
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, (self.data.parent / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops it at once, as a crash would; once is enough."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(60)
            self.process = None

    def _answers(self) -> bool:
        command = [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False, timeout=60).returncode == 0

    def database(self) -> str:
        """The URL of a new empty database."""
        name = f"t{uuid.uuid4().hex}"
        command = [self.bin / "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "guard", name]
        subprocess.run(command, check=True, timeout=60)
        return f"postgresql://guard@127.0.0.1:{self.port}/{name}"


def _die_with_the_tests() -> None:
    """A test run that is killed leaves no server behind: PR_SET_PDEATHSIG, as prctl(2) has it."""
    ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    places = (
        [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((place for place in places if (place / "postgres").exists()), None)


def new_server(directory: Path) -> Server:
    """A running cluster in an empty directory; skips the test, with the reason, where Postgres is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no Postgres here: neither initdb on the PATH nor /usr/lib/postgresql (apt-get install postgresql)")
    account = None
    if os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(_ACCOUNT)
        except KeyError:
            pytest.skip(f"Postgres refuses to run as root, and there is no user {_ACCOUNT}")
        account = _ACCOUNT
        os.chown(directory, entry.pw_uid, entry.pw_gid)
    server = Server(binaries, directory / "data", free_port(), account)
    with (directory / "initdb.log").open("ab") as log:
        command = [binaries / "initdb", "-D", server.data, "-U", "guard", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(command, check=True, stdout=log, stderr=log, user=account, cwd="/", timeout=120)
    server.start()
    return server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One cluster for all tests; each takes a database of its own."""
    # Not below pytest's directory, which only its owner may enter.
    directory = Path(tempfile.mkdtemp(prefix="reasonguard-postgres-"))
    try:
        server = new_server(directory)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it runs on both databases."""
    return str(request.param)


@pytest.fixture
def new_url(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], str]:
    """Makes the URL of a database that does not exist yet (SQLite) or is empty (Postgres)."""
    if kind == "postgres":
        server: Server = request.getfixturevalue("postgres")
        return server.database
    return lambda: f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.db"


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    """One such URL."""
    return new_url()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """An open, empty store."""
    opened = Store.open(url, migrate=True)
    yield opened
    opened.close()
