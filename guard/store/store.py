"""One database: SQLite by default, Postgres by URL. Connections, transactions, and the version of its tables."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from guard.errors import UserError
from guard.store.tables import VERSION_TABLE

WANTED = "sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
_MIGRATIONS = Path(__file__).parent / "migrations"
_WRITES = "reasonguard_writes"
#: Any number that no other program takes as its advisory lock in the same database.
_MIGRATION_LOCK = 0x5EA50264A2D
_CONNECT_SECONDS = 5
#: A sidecar that hangs or is cut off must not hold the others' rows for longer (milliseconds).
_LIMITS = {"lock_timeout": 10_000, "statement_timeout": 60_000, "idle_in_transaction_session_timeout": 60_000}
_BUSY_SECONDS = 10
#: What a crash of the machine takes from the log's end is read from the spool again; what is deleted is written over.
_PRAGMAS = (
    f"busy_timeout = {1000 * _BUSY_SECONDS}",
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "foreign_keys = ON",
    "secure_delete = ON",
)


class Store:
    """An open store whose tables fit this code. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str, *, migrate: bool = False) -> Store:
        """Connects. With `migrate` the database is made and brought up to date, else it must be.

        UserError for a URL that is none, tables that another version of the code made, or a SQLite file that cannot be
        opened; `sqlalchemy.exc.OperationalError` while a server cannot be reached.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            _make_file(parsed, create=migrate)
        store = cls(_engine(parsed))
        try:
            store._fit(migrate)
        except BaseException:
            store.close()
            raise
        return store

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that may write; UserError when another version's tables are there by now."""
        with self.engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
            if _revision(connection) != _newest():
                self._refuse(_revision(connection))
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    def __str__(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    def _fit(self, migrate: bool) -> None:
        with self.reading() as connection:
            found = _revision(connection)
        if found == _newest():
            return
        if not migrate or found not in {None, *_known()}:
            self._refuse(found)
        with self.engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                # Of sidecars that start together one migrates, and the others find it done.
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                connection.execute(text("SET LOCAL statement_timeout = 0"))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _refuse(self, found: str | None) -> None:
        if found is None:
            raise UserError(f"{self} holds no traces", fix="`serve` and `traces ingest` make its tables")
        newer = found not in _known()
        raise UserError(
            f"{self} was made by {'a newer' if newer else 'an older'} version of Reasonguard",
            got=f"tables of version {found}", wanted=_newest(),
            fix="Upgrade Reasonguard" if newer else "`serve` and `traces ingest` bring it up to date",
        )  # fmt: skip


def beside(traces: Path) -> str:
    """The URL of the store that `serve` keeps in a traces directory by default."""
    return URL.create("sqlite", database=str(traces / "store.db")).render_as_string()


def reason(error: Exception) -> str:
    """Why a database failed, in one line and without its statement."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).strip().split("\n")[0] or type(cause).__name__


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        # The URL itself stays out of the sentence: it may hold a password.
        raise UserError("The store's URL cannot be read", wanted=WANTED) from error
    name = parsed.drivername
    if name in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if name == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise UserError("The store's URL names no database that is known", got=f"{name}://", wanted=WANTED)


def _make_file(url: URL, *, create: bool) -> None:
    """What the spool keeps from other users of the machine, its copy must too."""
    path = Path(str(url.database))
    if not create and not path.exists():
        raise UserError(f"Store {path} does not exist", fix="`serve` and `traces ingest` make it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(f"Store {path} cannot be opened", got=error.strerror) from error


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    options = " ".join([str(url.query.get("options", "")), *(f"-c {name}={value}" for name, value in _LIMITS.items())])
    return create_engine(
        url,
        pool_size=2,
        pool_pre_ping=True,
        connect_args={"connect_timeout": _CONNECT_SECONDS, "options": options, "application_name": "reasonguard"},
    )


def _set_up_sqlite(connection: Any, _: object) -> None:
    # Transactions are begun by us: the driver would begin them too late, after what they must protect was read.
    connection.isolation_level = None
    for setting in _PRAGMAS:
        _set(connection, setting)


def _set(connection: Any, setting: str) -> None:
    """Of those that turn one new file to WAL at once, one may be told that it is locked without having waited, whatever
    `busy_timeout` says (https://www.sqlite.org/c3ref/busy_handler.html): 11 of 1,200 openings by eight at once."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(f"PRAGMA {setting}")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


@functools.cache
def _known() -> list[str]:
    """Versions of the tables that this code can bring up to date, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]


def _newest() -> str:
    return _known()[0]


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
