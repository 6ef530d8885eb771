"""Reading back: pages, filters, exports, reviews, and what is deleted."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from guard.errors import UserError
from guard.store import reading, retention, reviews
from guard.store.export import SCHEMA, export
from guard.store.ingest import Fed, Ingester
from guard.store.reading import Filter
from guard.store.store import Store
from guard.traces import Trace, read_traces
from tests.guard.store.kit import documents, dump, variant, write

ROOT = Path(__file__).parents[3]
SECRET = "sesame-4711"


def fill(store: Store, directory: Path, items: list[Trace]) -> None:
    write(directory, items)
    Ingester(store, directory).run()


def many(count: int) -> list[Trace]:
    """Traces of a few moments, so that pages end between equal ones."""
    return [variant(f"g{i:03}", i % 3) for i in range(count)]


def test_pages_leave_nothing_out_and_repeat_nothing(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, many(200))
    read = list(reading.read(store))
    assert [trace.guard_id for trace in read] == [f"g{i:03}" for m in range(3) for i in range(200) if i % 3 == m]
    assert {trace.guard_id: trace for trace in read} == {t.guard_id: t for t in read_traces(tmp_path)[0]}
    assert reading.newest(store, 3) == read[-3:]
    assert reading.count(store) == 200
    assert reading.damage(store) == (1, 0)


def test_pages_go_on_after_a_hostile_id(store: Store, tmp_path: Path) -> None:
    ids = sorted({chr(i) * 3 for i in range(200)} | {f"a{chr(i)}b" for i in range(40)})
    fill(store, tmp_path, [variant(guard_id, 1) for guard_id in ids])
    assert sorted(trace.guard_id for trace in reading.read(store)) == ids


def test_filters(store: Store, tmp_path: Path) -> None:
    items = [variant(name, number) for number, name in enumerate("abcd")]
    items[0].receipt.policy_hash, items[1].weights, items[2].tenant = "p1", "w1", "acme"
    items[2].receipt.unscored = 1
    fill(store, tmp_path, [*items, variant("probe-1", 2)])

    def ids(**wanted: Any) -> str:
        return "".join(trace.guard_id for trace in reading.read(store, Filter(**wanted)))

    assert ids() == "abcd"
    assert (ids(since=101), ids(until=101), ids(since=101, until=103)) == ("bcd", "a", "bc")
    assert (ids(policy_hash="p1"), ids(weights="w1"), ids(tenant="acme"), ids(tenant="")) == ("a", "b", "c", "abd")
    assert ids(intervened=True) == "bd"
    assert ids(intervened=True, since=102) == "d"
    assert ids(unscored=True) == "c"
    assert reading.find(store, "probe-1") == variant("probe-1", 2)


def test_a_parquet_file_holds_what_the_store_holds(store: Store, tmp_path: Path) -> None:
    items = many(150)
    fill(store, tmp_path / "spool", items)
    reviews.add(store, "g001", 1, "cue", "ann", now=5.0)
    reviews.add(store, "g001", None, "missed", "bob\ud800", "n\0te", now=6.0)
    ticks: list[int] = []
    out = tmp_path / "new" / "traces.parquet"
    assert export(store, out, tick=ticks.append) == 150
    assert ticks == [64, 64, 22]
    assert [path.name for path in out.parent.iterdir()] == ["traces.parquet"]
    assert out.stat().st_mode & 0o777 == 0o600
    table = pq.read_table(out)
    assert table.schema.equals(SCHEMA)
    rows = {row["guard_id"]: row for row in table.to_pylist()}
    for trace in items:
        row = rows[trace.guard_id]
        assert row.pop("reviews") == ([] if trace.guard_id != "g001" else [
            {"step": 1, "label": "cue", "reviewer": "ann", "created": 5.0, "note": ""},
            {"step": None, "label": "missed", "reviewer": "bob?", "created": 6.0, "note": "n\0te"},
        ])  # fmt: skip
        wanted = {**trace.receipt.model_dump(), **trace.model_dump(exclude={"receipt", "lengths", "schema_version"})}
        extra = {"prompt_tokens": 2, "output_tokens": 4, "replaced_tokens": 0, "clean": True}
        assert row == wanted | extra
    assert export(store, out, Filter(since=102)) == 50


def test_an_export_that_fails_leaves_the_old_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, tmp_path / "spool", many(3))
    out = tmp_path / "traces.parquet"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"traces.parquet cannot be written; got No space left"):
        export(store, out)
    assert out.read_text() == "old"
    assert list(tmp_path.glob(".traces*")) == []


EXPORT = """
    import resource, sys
    from pathlib import Path
    from guard.store.export import export
    from guard.store.store import Store
    for url in sys.argv[2:]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(export(Store.open(url), Path(sys.argv[1])))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_export_takes_no_more_memory_for_more_traces(tmp_path: Path) -> None:
    urls = []
    for count in (64, 400):
        urls.append(f"sqlite:///{tmp_path}/{count}.db")
        store = Store.open(urls[-1], migrate=True)
        fill(store, tmp_path / str(count), [
            variant(f"g{i}").model_copy(update={"output_ids": list(range(10_000 * i, 10_000 * i + 4000))})
            for i in range(count)
        ])  # fmt: skip
        store.close()
    command = [sys.executable, "-c", textwrap.dedent(EXPORT), tmp_path / "o.parquet", *urls]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    first, second, kilobytes = map(int, done.stdout.split())
    assert (first, second) == (64, 400)
    # One page takes about 20 MB, and the first export had that too; all 400 traces would take over 80.
    assert kilobytes < 30_000


def test_reviews_are_kept_by_person_and_time(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, [variant("a", 1), variant("b", 1)])
    first = reviews.add(store, "a", 1, "cue", "ann", now=7.0)
    second = reviews.add(store, "a", 1, "not_cue", "bob", "on a second look", now=6.0)
    other = reviews.add(store, "b", None, "missed", "ann")
    assert reviews.of_traces(store, ["a"]) == [second, first]
    assert reviews.of_traces(store, ["a", "b"]) == [second, first, other]
    assert other.created > 1.7e9
    with pytest.raises(UserError, match="has no step 2 of trace a"):
        reviews.add(store, "a", 2, "cue", "ann")
    with pytest.raises(UserError, match="has no trace c"):
        reviews.add(store, "c", None, "cue", "ann")
    with pytest.raises(UserError, match=r"A review's label; got maybe; wanted cue, not_cue, missed, "):
        reviews.add(store, "a", 1, "maybe", "ann")  # type: ignore[arg-type]
    # A trace that is written again keeps what was said about it.
    write(tmp_path, [variant("a", 3)], "spool-20260109-1.jsonl")
    Ingester(store, tmp_path).run()
    assert reviews.of_traces(store, ["a"]) == [second, first]


def test_said_twice_is_said_once_and_can_be_taken_back(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, [variant("a", 1), variant("b", 1)])
    first = reviews.add(store, "a", 1, "cue", "ann", now=7.0)
    assert reviews.add(store, "a", 1, "cue", "ann", now=8.0) == first
    changed = reviews.add(store, "a", 1, "not_cue", "ann", now=9.0)
    other = reviews.add(store, "a", 1, "missed", "bob", now=9.5)
    kind = reviews.add(store, "b", None, "harmful", "ann", now=10.0)
    assert reviews.of_traces(store, ["a", "b"]) == [first, changed, other, kind]
    assert reviews.standing(store, ["a", "b"]) == [changed, other, kind]
    assert reviews.reviewed_traces(store) == ["a"]
    number, last = reviews.last_of(store, "ann") or (0, None)
    assert last == kind
    # Nobody takes back what another has said, and what is undone is undone once.
    assert reviews.undo(store, "bob", number) is None
    assert reviews.undo(store, "ann", number) == kind
    assert reviews.undo(store, "ann", number) is None
    assert [each.label for each in reviews.of_traces(store, ["b"])] == ["harmful", "undone"]
    number, last = reviews.last_of(store, "ann") or (0, None)
    assert last == changed
    assert reviews.undo(store, "ann", number) == changed
    assert reviews.standing(store, ["a", "b"]) == [other]
    assert reviews.last_of(store, "ann") is None
    # What was taken back can be said again.
    again = reviews.add(store, "a", 1, "not_cue", "ann", now=12.0)
    assert reviews.standing(store, ["a"]) == [other, again]


def test_two_that_say_the_same_at_once_say_it_once(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, [variant("a", 1)])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: reviews.add(store, "a", 0, "cue", "ann"), range(8)))
    assert len(reviews.of_traces(store, ["a"])) == 1


def on_disk(directory: Path) -> bool:
    """Whether the secret stands in any file of a SQLite store."""
    return any(SECRET.encode() in path.read_bytes() for path in directory.glob("store.db*"))


def old_and_new(directory: Path) -> list[Trace]:
    items = [variant(f"g{i:03}", i) for i in range(200)]
    for trace in items:
        trace.request = f"{SECRET} {trace.guard_id}" + "x" * 3000
        trace.output_ids = list(range(1000))
    write(directory, items)
    return items


def test_what_is_too_old_is_deleted(store: Store, tmp_path: Path) -> None:
    items = old_and_new(tmp_path)
    Ingester(store, tmp_path).run()
    for guard_id in ("g000", "g150"):
        reviews.add(store, guard_id, 0, "cue", "ann")
    assert retention.count_old(store, 250.0, content=False) == 150
    ticks: list[int] = []
    assert retention.prune(store, 250.0, ticks.append) == 150
    assert ticks == [64, 64, 22]
    assert documents(store) == {trace.guard_id: trace for trace in items[150:]}
    assert {row["guard_id"] for row in dump(store)["steps"]} == {trace.guard_id for trace in items[150:]}
    assert [review.guard_id for review in reviews.of_traces(store, ["g000", "g150"])] == ["g150"]
    # It does not come back from the spool.
    assert Ingester(store, tmp_path).run() == Fed()
    assert retention.prune(store, 250.0) == 0


def test_content_alone_is_taken_out(store: Store, tmp_path: Path) -> None:
    items = old_and_new(tmp_path)
    Ingester(store, tmp_path).run()
    before = dump(store)
    assert retention.count_old(store, 250.0, content=True) == 150
    assert retention.prune_content(store, 250.0) == 150
    after = documents(store)
    assert [after[trace.guard_id] for trace in items] == [
        *(trace.keeping("none") for trace in items[:150]), *items[150:],
    ]  # fmt: skip
    assert {row["log_content"] for row in dump(store)["traces"][:150]} == {"none"}
    assert [row["output_tokens"] for row in dump(store)["traces"]] == [1000] * 200
    assert dump(store)["steps"] == before["steps"]
    assert retention.count_old(store, 250.0, content=True) == 0
    # Read again from its start, the spool does not bring it back.
    write(tmp_path, [*items[:-1], variant("g199", 199)])
    Ingester(store, tmp_path).run()
    assert documents(store)["g000"] == items[0].keeping("none")


@pytest.mark.parametrize("way", [retention.prune, retention.prune_content])
def test_no_file_of_sqlite_keeps_what_was_deleted(tmp_path: Path, way: Any) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db", migrate=True)
    old_and_new(tmp_path / "spool")
    Ingester(store, tmp_path / "spool").run()
    assert on_disk(tmp_path)
    assert way(store, 1e9) == 200
    assert not on_disk(tmp_path)
    store.close()
    assert not on_disk(tmp_path)


def test_spool_files_go_once_they_are_old_and_read(store: Store, tmp_path: Path) -> None:
    day = 1_767_225_600.0  # 2026-01-01 00:00 UTC
    write(tmp_path, [variant("a")], "spool-20260101-1.jsonl")
    write(tmp_path, [b"no trace\n"], "spool-20260101-2.jsonl")
    write(tmp_path, [variant("c"), b"{torn"], "spool-20260102-1.jsonl")
    Ingester(store, tmp_path).run()
    write(tmp_path, [variant("b"), variant("b2")], "spool-20260101-3.jsonl")
    (tmp_path / "notes.jsonl").write_text("mine")
    # Until the day's end more may come.
    assert retention.prune_files(store, tmp_path, day + 86_399) == retention.Pruned()
    assert retention.prune_files(store, tmp_path, day + 86_400) == retention.Pruned(deleted=2, waiting=1)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "notes.jsonl", "spool-20260101-3.jsonl", "spool-20260102-1.jsonl",
    ]  # fmt: skip
    Ingester(store, tmp_path).run()
    assert retention.prune_files(store, tmp_path, day + 2 * 86_400) == retention.Pruned(deleted=2)
    assert dump(store)["spool_files"] == []
    assert sorted(documents(store)) == ["a", "b", "b2", "c"]
