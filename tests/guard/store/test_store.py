"""Opening a store: URLs, migrations, versions, hostile text."""

from __future__ import annotations

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from guard.engine.launch import free_port
from guard.errors import UserError
from guard.store import reviews
from guard.store import store as store_module
from guard.store.ingest import Ingester
from guard.store.reading import find
from guard.store.store import Store, beside, reason
from guard.store.tables import VERSION_TABLE, metadata
from tests.guard.store.kit import documents, variant, write


def set_version(store: Store, version: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'"))


def opened_at(url: str, version: str) -> Store:
    """A store whose tables are those of an older version."""
    store = Store(store_module._engine(store_module._parse(url)))
    with store.engine.connect() as connection, connection.begin():
        config = store_module._config()
        config.attributes["connection"] = connection
        command.upgrade(config, version)
    return store


def test_the_migrations_make_the_tables_that_the_code_uses(store: Store) -> None:
    with store.reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_the_previous_version_is_brought_up_with_what_it_holds(url: str, tmp_path: Path) -> None:
    old = opened_at(url, "0001")
    write(tmp_path / "spool", [variant("a", 1)])
    with pytest.raises(UserError, match=r"made by an older version .* got tables of version 0001; wanted 0003"):
        Ingester(old, tmp_path / "spool").run()
    columns = {c["name"] for c in inspect(old.engine).get_columns("traces")}
    with old.engine.begin() as connection:
        row = dict.fromkeys(columns, 0) | {"guard_id": "a", "document": variant("a", 1).model_dump_json()}
        for name in ("file", "model", "weights", "tenant", "tokenizer_hash", "log_content", "policy", "policy_hash"):
            row[name] = ""
        row |= {"detector": "", "engine": "", "shadow": False, "probe": False, "clean": True}
        names = ", ".join(f'"{name}"' for name in row)
        connection.execute(text(f"INSERT INTO traces ({names}) VALUES ({', '.join(f':{n}' for n in row)})"), row)
    old.close()
    with pytest.raises(UserError, match="`serve` and `traces ingest` bring it up to date"):
        Store.open(url)
    new = Store.open(url, migrate=True)
    assert find(new, "a") == variant("a", 1)
    reviews.add(new, "a", None, "not_cue", "ann")
    new.close()
    Store.open(url).close()


def test_a_newer_version_is_refused_and_left_alone(store: Store, url: str, tmp_path: Path) -> None:
    write(tmp_path / "spool", [variant("a")])
    set_version(store, "0999")
    for migrate in (False, True):
        with pytest.raises(UserError, match=r"made by a newer version of Reasonguard; got tables of version 0999"):
            Store.open(url, migrate=migrate)
    # One that was open before as well.
    with pytest.raises(UserError, match=r"newer version .* Upgrade Reasonguard"):
        Ingester(store, tmp_path / "spool").run()
    assert documents(store) == {}


def test_an_empty_database_is_not_made_by_a_reader(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist|holds no traces"):
        Store.open(url)
    assert list(tmp_path.glob("*.db*")) == []


def test_those_that_start_together_migrate_once(url: str) -> None:
    def start(_: int) -> None:
        Store.open(url, migrate=True).close()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(start, range(6))) == [None] * 6
    Store.open(url).close()


def test_a_migration_that_fails_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = command.upgrade

    def halfway(config: object, version: str) -> None:
        real(config, version)  # type: ignore[arg-type]
        raise RuntimeError("killed")

    monkeypatch.setattr(command, "upgrade", halfway)
    with pytest.raises(RuntimeError, match="killed"):
        Store.open(url, migrate=True)
    bare = Store(store_module._engine(store_module._parse(url)))
    assert inspect(bare.engine).get_table_names() == []
    bare.close()
    monkeypatch.undo()
    Store.open(url, migrate=True).close()


@given(st.text(st.characters(), max_size=30), st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_reads_back_as_it_was(store: Store, tmp_path: Path, note: str, reviewer: str) -> None:
    if find(store, "a") is None:
        write(tmp_path, [variant("a")])
        Ingester(store, tmp_path).run()
    said = reviews.add(store, "a", None, "missed", reviewer, note)
    assert reviews.of_traces(store, ["a"])[-1] == said
    assert (said.reviewer, said.note) == (reviewer, note)


@pytest.mark.parametrize("hostile", ["\0", "a\ud800", "\x01", "'; DROP TABLE traces; --", "%s%(x)s:name"])
def test_a_hostile_id_finds_nothing_and_breaks_nothing(store: Store, hostile: str) -> None:
    assert find(store, hostile) is None


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("traces.db", "cannot be read; wanted sqlite:///PATH or postgresql://"),
        ("postgresql://guard:s3cret@host:port/db", "cannot be read; wanted sqlite:///PATH or postgresql://"),
        ("mysql://guard:s3cret@host/db", "names no database that is known; got mysql://"),
        ("sqlite://", "names no database that is known; got sqlite://"),
        ("sqlite:///:memory:", "names no database that is known; got sqlite://"),
    ],
)
def test_a_url_that_is_none_is_told_without_its_password(url: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        Store.open(url, migrate=True)
    assert wanted in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OperationalError) as caught:
        Store.open(f"postgresql://guard:s3cret@127.0.0.1:{free_port()}/db", migrate=True)
    assert "refused" in reason(caught.value)
    assert "s3cret" not in reason(caught.value)
    assert "\n" not in reason(caught.value)


@pytest.mark.parametrize("released", [True, False])
def test_a_new_file_that_another_is_turning_to_wal_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: bool
) -> None:
    """Its write lock is told at once: SQLite does not wait for it here."""
    path = tmp_path / "s.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(store_module, "_BUSY_SECONDS", 10 if released else 0.2)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Store.open, f"sqlite:///{path}", migrate=True)
        with pytest.raises(TimeoutError):
            opening.result(0.1)
        if released:
            other.execute("COMMIT")
            opening.result(20).close()
            assert other.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
        else:
            with pytest.raises((OperationalError, UserError), match="locked"):
                opening.result(20)
    other.close()


def test_a_sqlite_store_is_its_owners_and_survives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "100%20 ?" / "store.db"
    url = beside(path.parent)
    store = Store.open(url, migrate=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert {p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {0o600}
    store.close()
    path.write_bytes(b"no database at all, but longer than a header would be " * 40)
    with pytest.raises(Exception, match="file is not a database"):
        Store.open(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/store.db cannot be opened; got"):
        Store.open(f"sqlite:///{tmp_path}/file/store.db", migrate=True)


def test_a_stores_name_hides_the_password() -> None:
    store = Store(store_module._engine(store_module._parse("postgres://guard:s3cret@db/traces")))
    assert str(store) == "postgresql+psycopg://guard:***@db/traces"
