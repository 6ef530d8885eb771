"""The store's commands as a user runs them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cli import app
from guard.errors import UserError
from guard.store.ingest import Ingester
from guard.store.store import Store
from tests.guard.store.kit import variant, write


def cli(*args: object) -> Result:
    """The command line in this process: a start of its own takes a second, and `tests/test_cli.py` has those."""
    return CliRunner().invoke(app, [str(each) for each in args], env={"COLUMNS": "200"})


def sentence(result: Result) -> str:
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Two old traces and one of today, of which the policy kept only ids."""
    directory = tmp_path / "spool"
    today = variant("new", 3).model_copy(update={"created": time.time(), "tenant": "acme"}).keeping("ids")
    write(directory, [variant("a", 1), variant("b", 2), b"torn\n"])
    write(directory, [today], time.strftime("spool-%Y%m%d-1.jsonl", time.gmtime()))
    return directory


def test_from_a_directory_to_a_file_and_out(url: str, spool: Path, tmp_path: Path) -> None:
    taken = cli("traces", "ingest", spool, "--store", url)
    assert (taken.exit_code, taken.stderr) == (0, "3 traces taken from 4 lines; 1 malformed.\n")
    assert cli("traces", "ingest", spool, "--store", url).stderr == "0 traces taken from 0 lines; 0 malformed.\n"

    listed = cli("traces", "ls", "--store", url, "--json", "--limit", 2)
    assert listed.stderr == "3 traces from 2 files; 1 malformed lines skipped.\n"
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(row["guard_id"], row["tokens"], row["request"]) for row in rows] == [
        ("b", 4, "request 2\0\n"), ("new", 4, ""),
    ]  # fmt: skip
    assert "(not kept)" in cli("traces", "ls", "--store", url).stdout

    shown = cli("traces", "show", "a", "--store", url)
    assert "request:  request 1" in shown.stdout
    assert "policy default ffffffffffff, detector d, engine vllm-v1" in shown.stdout
    assert "request:  (not kept)" in cli("traces", "show", "--store", url, "new").stdout
    gone = cli("traces", "show", "--store", url, "c")
    assert sentence(gone) == "No trace c in the store. `traces ls` lists what there is."

    out = tmp_path / "t.parquet"
    wrote = cli("traces", "export", "--store", url, "--out", out, "--until", "2001-01-01", "--intervened")
    assert (wrote.exit_code, wrote.stderr) == (0, f"1 traces in {out}.\n")
    assert pq.read_table(out)["guard_id"].to_pylist() == ["a"]
    assert cli("traces", "export", "--store", url, "--out", out, "--tenant", "acme").stderr == f"1 traces in {out}.\n"

    asked = cli("traces", "prune", "--store", url, "--older-than", 1, "--dry-run")
    assert asked.stderr.startswith("2 traces from before 20")
    pruned = cli("traces", "prune", spool, "--store", url, "--older-than", 1)
    assert pruned.exit_code == 0
    assert pruned.stderr.startswith("2 traces from before 20")
    assert pruned.stderr.endswith(" UTC deleted; 1 spool files deleted, 0 not read to their end.\n")
    assert [p.name[:14] for p in spool.iterdir()] == [time.strftime("spool-%Y%m%d", time.gmtime())]
    assert cli("traces", "ls", "--store", url).stderr == "1 traces from 1 files; 0 malformed lines skipped.\n"


def test_content_alone_is_pruned(tmp_path: Path, spool: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    store = Store.open(url, migrate=True)
    Ingester(store, spool).run()
    store.close()
    said = cli("traces", "prune", "--store", url, "--older-than", 1, "--content").stderr
    assert said.endswith(" UTC bared of content.\n")
    assert "(not kept)" in cli("traces", "show", "a", "--store", url).stdout
    assert cli("traces", "ls", "--store", url).stderr.startswith("3 traces")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["ls"], "Say where the traces are; wanted either a trace directory or --store URL."),
        (["ls", "HERE", "--store", "sqlite:///x.db"], "Say where the traces are; wanted either a trace directory"),
        (["show", "HERE"], "Say where the traces are; wanted either a trace directory or --store URL."),
        (["show", "a", "b", "c"], "traces show; got a b c; wanted a directory and an id."),
        (["ls", "--store", "sqlite:///HERE/none.db"], "HERE/none.db does not exist. `serve` and `traces"),
        (["ls", "--store", "postgresql://u:s3cret@127.0.0.1:1/x"], "The store failed; got "),
        (["ls", "--store", "sqlite:///HERE/broken.db"], "The store failed; got file is not a database."),
        (["ingest", "HERE/none", "--store", "sqlite:///HERE/x.db"], "Trace directory HERE/none does not exist."),
        (["export", "--store", "sqlite:///HERE/good.db", "--out", "HERE/broken.db/x"], "cannot be written; got File"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[str], wanted: str) -> None:
    (tmp_path / "broken.db").write_bytes(b"no database at all, but longer than a header would be " * 40)
    Store.open(f"sqlite:///{tmp_path}/good.db", migrate=True).close()
    said = sentence(cli("traces", *(each.replace("HERE", str(tmp_path)) for each in arguments)))
    assert wanted.replace("HERE", str(tmp_path)) in said
    assert "s3cret" not in said
