"""The spool into the store: nothing lost, nothing twice, whatever the order, the damage and the company."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from guard.store import ingest as ingest_module
from guard.store import spool as spool_module
from guard.store.ingest import Fed, Ingester
from guard.store.store import Store
from guard.store.tables import spool_files, traces
from guard.traces import GuardTime, Spool, Trace, read_traces
from tests.guard.store.kit import documents, dump, spooled, variant, write
from tests.guard.test_traces import make


def test_every_column_of_a_trace(store: Store, tmp_path: Path) -> None:
    trace = make("a", request="How\0?", unscored=1).model_copy(
        update={"tenant": "acme", "weights": "w1", "guard_time": GuardTime(request=7, steps=[1, 2])}
    )
    path = write(tmp_path, [b"torn\n", trace])
    assert Ingester(store, tmp_path).run() == Fed(lines=2, traces=1, malformed=1)
    tables = dump(store)
    assert tables["traces"] == [{
        "guard_id": "a", "file": path.name, "at": 5, "created": 1.5, "model": "m", "weights": "w1", "tenant": "acme",
        "tokenizer_hash": "0" * 12, "log_content": "full", "prompt_tokens": 2, "output_tokens": 3,
        "policy": "default", "policy_hash": "f" * 12, "detector": "d", "engine": "vllm-v1", "shadow": False,
        "probe": False, "clean": False, "seen": 1, "scored": 1, "unscored": 1, "unreadable": 0, "cues": 1,
        "interventions": 1, "injected_tokens": 1, "replaced_tokens": 0, "enforcement_failed": 0, "guard_us": 10,
        "document": trace.model_dump_json(),
    }]  # fmt: skip
    assert tables["steps"] == [
        {
            "guard_id": "a", "index": 0, "start": 0, "end": 1, "zone": "reasoning", "score": 0.875, "cue": True,
            "injected": False, "unreadable": False,
        },
        {
            "guard_id": "a", "index": 1, "start": 1, "end": 2, "zone": "reasoning", "score": None, "cue": False,
            "injected": True, "unreadable": False,
        },
    ]  # fmt: skip
    assert tables["interventions"] == [{
        "guard_id": "a", "index": 0, "step": 0, "at": 1, "trigger_id": "victim", "rung": "trigger", "mode": "inject",
        "score": 0.875, "forced": 1, "completed": True,
    }]  # fmt: skip
    (place,) = tables["spool_files"]
    assert (place["name"], place["offset"], place["last_at"], place["malformed"]) == (
        path.name, path.stat().st_size, 5, 1,
    )  # fmt: skip


def test_growth_is_taken_as_it_comes_and_a_torn_line_is_waited_for(store: Store, tmp_path: Path) -> None:
    ingester = Ingester(store, tmp_path)
    assert ingester.step() is None
    Spool(tmp_path).append(variant("a", 1))
    assert ingester.run() == Fed(lines=1, traces=1)
    assert ingester.step() is None
    (path,) = tmp_path.glob("spool-*.jsonl")
    line = spooled([variant("b", 2)])
    with path.open("ab", buffering=0) as out:
        out.write(line[:40])
        assert ingester.run() == Fed()
        assert ingester.behind() == 40
        out.write(line[40:])
    assert ingester.run() == Fed(lines=1, traces=1)
    assert ingester.behind() == 0
    assert documents(store) == {"a": variant("a", 1), "b": variant("b", 2)}


@pytest.mark.parametrize("first", [0, 1])
def test_the_later_line_holds_whichever_file_comes_first(store: Store, tmp_path: Path, first: int) -> None:
    # The clock went back between the two: the place in the spool decides, as in `read_traces`.
    old, new = variant("a", 3), variant("a", 2)
    places = [tmp_path / "0", tmp_path / "1"]
    write(places[0], [old], "spool-20260101-1.jsonl")
    write(places[1], [new], "spool-20260102-1.jsonl")
    written = [Ingester(store, places[i]).run().traces for i in (first, 1 - first)]
    assert written == ([1, 1] if first == 0 else [1, 0])
    assert documents(store) == {"a": new}
    tables = dump(store)
    assert [row["index"] for row in tables["steps"]] == [0]
    assert tables["interventions"] == []


def test_a_file_that_was_moved_or_copied_is_known_again(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "here", [variant("a"), variant("b")])
    Ingester(store, tmp_path / "here").run()
    (tmp_path / "there").mkdir()
    shutil.copy(path, tmp_path / "there" / "spool-20260101-9.jsonl")
    assert Ingester(store, tmp_path / "there").run() == Fed()
    assert len(dump(store)["spool_files"]) == 1


def test_a_copy_of_a_files_beginning_takes_nothing_away(store: Store, tmp_path: Path) -> None:
    items = [variant(f"g{i}") for i in range(9)]
    write(tmp_path / "copy", items[:3])
    for count in (6, 9):
        write(tmp_path / "whole", items[:count])
        for place in ("whole", "copy", "whole"):
            Ingester(store, tmp_path / place).run()
    assert documents(store) == {trace.guard_id: trace for trace in items}


def test_a_file_that_was_cut_and_written_anew_is_read_from_its_start(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path, [variant("a"), variant("b"), b"torn\n"])
    ingester = Ingester(store, tmp_path)
    ingester.run()
    path.write_bytes(spooled([variant("a"), variant("c"), variant("d"), variant("e"), variant("f")]))
    ingester.run()
    assert sorted(documents(store)) == ["a", "b", "c", "d", "e", "f"]
    assert [row["malformed"] for row in dump(store)["spool_files"]] == [0]


def test_two_files_that_begin_with_the_same_damage_are_two(store: Store, tmp_path: Path) -> None:
    write(tmp_path, [b"{\n", variant("a")], "spool-20260101-1.jsonl")
    write(tmp_path, [b"{\n", variant("b")], "spool-20260101-2.jsonl")
    Ingester(store, tmp_path).run()
    assert sorted(documents(store)) == ["a", "b"]


def poisoned() -> list[Trace | bytes]:
    """Lines that are traces, but not rows of any database."""
    far = variant("far")
    far.steps[0].start = 2**70
    return [
        variant("x" * 5000),
        far,
        variant("z").model_copy(update={"tenant": "t" * 3000}),
        spooled([variant("q")]).replace(b"100.0", b"1e999"),
    ]


def test_a_line_that_no_database_takes_holds_nobody_up(store: Store, tmp_path: Path) -> None:
    bad = poisoned()
    good = [variant(name) for name in "abcde"]
    write(tmp_path, [good[0], *bad[:2], good[1], bad[2], good[2], bad[3], *good[3:], b"\n", b"  \n", b"\xff\n"])
    assert Ingester(store, tmp_path).run() == Fed(lines=12, traces=5, malformed=5)
    assert documents(store) == {trace.guard_id: trace for trace in good}


def test_a_line_too_long_is_passed_over_once_it_has_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "MAX_LINE", 2000)
    monkeypatch.setattr(spool_module, "_PIECE", 300)
    monkeypatch.setattr(spool_module, "_HASHED", 1000)
    path = write(tmp_path, [variant("a"), b"x" * 7000])
    ingester = Ingester(store, tmp_path)
    assert ingester.run() == Fed(lines=1, traces=1)
    with path.open("ab") as out:
        out.write(b"\n")
    assert ingester.run() == Fed(lines=1, malformed=1)
    with path.open("ab") as out:
        out.write(spooled([variant("b")]))
    assert ingester.run() == Fed(lines=1, traces=1)
    assert sorted(documents(store)) == ["a", "b"]


def test_batches_are_bounded_in_lines_and_bytes(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [variant(f"g{i}") for i in range(10)]
    write(tmp_path, items)
    monkeypatch.setattr(ingest_module, "BATCH_BYTES", len(spooled(items[:3])))
    by_bytes = Ingester(store, tmp_path)
    assert [fed.lines for fed in iter(by_bytes.step, None)] == [3, 3, 3, 1]
    with store.writing() as connection:
        connection.execute(delete(spool_files))
    by_lines = Ingester(store, tmp_path, batch_lines=2)
    assert [(fed.lines, fed.traces) for fed in iter(by_lines.step, None)] == [(2, 0)] * 5


NAMES = ("spool-20260101-1.jsonl", "spool-20260101-2.jsonl", "spool-20260102-1.jsonl")
LINES = st.lists(
    st.one_of(
        st.builds(variant, st.sampled_from("abcd"), st.integers(0, 5)),
        st.sampled_from([b"\n", b"{torn\n", b"\xff\xfe\n"]),
    ),
    max_size=8,
)
FILES = st.lists(st.tuples(LINES, st.sampled_from([b"", b"{unfinished"])), min_size=1, max_size=3)
#: Which file grows to which share of its bytes, how many batches of which size are then taken, and whether
#: the store forgets how far it was.
MOVES = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=12
)


@given(FILES, MOVES, st.permutations(range(3)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_repetition_gives_the_same_tables(
    store: Store, tmp_path: Path, files: list[tuple[Any, bytes]], moves: list[Any], order: list[int]
) -> None:
    files = [(_unique(items, index), tail) for index, (items, tail) in enumerate(files)]
    whole = [spooled(items) + tail for items, tail in files]
    # Every file under its own directory, so that any may be taken first; and all in one, for `read_traces`.
    for place in ("merged", "0", "1", "2"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
        (tmp_path / place).mkdir()
    for name, content in zip(NAMES, whole, strict=False):
        (tmp_path / "merged" / name).write_bytes(content)
    _clear(store)
    ingesters = [Ingester(store, tmp_path / str(i)) for i in range(3)]
    for index, share, batches, size, forgets in moves:
        _grow(tmp_path, index, whole, share)
        ingesters[index].batch_lines = size
        for _ in range(batches):
            ingesters[index].step()
        if forgets:
            with store.writing() as connection:
                connection.execute(delete(spool_files))
            ingesters[index] = Ingester(store, tmp_path / str(index))
    for index in order:
        _grow(tmp_path, index, whole, 1.0)
        Ingester(store, tmp_path / str(index)).run()
    mixed = dump(store)
    found, report = read_traces(tmp_path / "merged")
    assert documents(store) == {trace.guard_id: trace for trace in found}
    _clear(store)
    Ingester(store, tmp_path / "merged").run()
    assert mixed == dump(store)
    torn = sum(bool(tail) for (items, tail) in files)
    without = sum(_damaged(items) for items, _ in files if not any(isinstance(i, Trace) for i in items))
    assert sum(row["malformed"] for row in mixed["spool_files"]) == report.malformed - torn - without


def _unique(items: list[Trace | bytes], index: int) -> list[Trace | bytes]:
    """No two files begin with the same trace, unless one is a copy."""
    first = next((i for i, item in enumerate(items) if isinstance(item, Trace)), None)
    return items if first is None else [*items[:first], variant(f"first-{index}"), *items[first:]]


def _clear(store: Store) -> None:
    with store.writing() as connection:
        connection.execute(delete(traces))
        connection.execute(delete(spool_files))


def _grow(directory: Path, index: int, whole: list[bytes], share: float) -> None:
    if index < len(whole):
        path = directory / str(index) / NAMES[index]
        size = max(round(share * len(whole[index])), path.stat().st_size if path.exists() else 0)
        path.write_bytes(whole[index][:size])


def _damaged(items: list[Trace | bytes]) -> int:
    return sum(isinstance(item, bytes) and bool(item.strip()) for item in items)


def test_many_sidecars_share_one_store(new_url: Callable[[], str], tmp_path: Path) -> None:
    """Eight feed at once: four directories, two from each; two of the directories hold the same requests."""
    url = new_url()
    for i in range(4):
        items = [variant(f"{i // 2}-{n % 40}", (n * 7 + i) % 11) for n in range(120)]
        write(tmp_path / str(i), [variant(f"first-{i}"), *items], f"spool-2026010{i + 1}-1.jsonl")

    def feed(number: int) -> None:
        mine = Store.open(url, migrate=True)
        Ingester(mine, tmp_path / str(number % 4), batch_lines=7).run()
        mine.close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(feed, range(8))) == [None] * 8
    shared, alone = Store.open(url), Store.open(new_url(), migrate=True)
    for i in range(4):
        Ingester(alone, tmp_path / str(i)).run()
    assert dump(shared) == dump(alone)
    assert len(documents(shared)) == 84
    shared.close()
    alone.close()
