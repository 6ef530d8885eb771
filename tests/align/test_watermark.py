"""Every trace is taken by one run, an interrupted run takes the same again, and earlier pairs are not lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from align.pairs import write_pairs
from align.watermark import Watermark
from guard.policy import Policy
from guard.traces import Trace
from tests.align.runs import pair
from tests.guard.sidecar.scripted import trace_of


def traces(*ids: str) -> list[Trace]:
    return [trace_of(guard_id, Policy()) for guard_id in ids]


def ids(found: list[Trace]) -> list[str]:
    return [trace.guard_id for trace in found]


@given(st.lists(st.sets(st.sampled_from("abcdefgh")), max_size=5))
def test_no_trace_is_taken_twice_and_none_is_lost(weeks: list[set[str]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        seen: list[str] = []
        logged: set[str] = set()
        for number, week in enumerate(weeks):
            logged |= week
            out = Path(root) / f"run-{number}"
            out.mkdir()
            mark = Watermark(Path(root), "base")
            seen += ids(mark.take(traces(*sorted(logged)), out))
            mark.commit(out)
        assert sorted(seen) == sorted(logged)


def test_an_interrupted_run_takes_the_same_again(tmp_path: Path) -> None:
    first = Watermark(tmp_path, "base")
    assert ids(first.take(traces("a", "b"), tmp_path)) == ["a", "b"]
    again = Watermark(tmp_path, "base")
    assert not again.finished(tmp_path)
    assert ids(again.take(traces("a", "b", "c"), tmp_path)) == ["a", "b"]
    again.commit(tmp_path)
    again.commit(tmp_path)
    last = Watermark(tmp_path, "base")
    assert last.finished(tmp_path)
    assert ids(last.new(traces("a", "b", "c"))) == ["c"]
    assert len((tmp_path / "consumed.jsonl").read_text().splitlines()) == 1


def test_another_model_has_a_watermark_of_its_own(tmp_path: Path) -> None:
    mark = Watermark(tmp_path, "base")
    mark.take(traces("a"), tmp_path)
    mark.commit(tmp_path)
    assert ids(Watermark(tmp_path, "other").new(traces("a"))) == ["a"]


def test_pairs_of_earlier_runs_are_kept_once_they_were_taken(tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, guard_id in zip(outs, "abc", strict=True):
        out.mkdir()
        mark = Watermark(tmp_path, "base")
        mark.take(traces(guard_id), out)
        write_pairs([pair(guard_id)], out / "pairs.jsonl")
        if out is not outs[2]:
            mark.commit(out)
    assert [p.guard_id for p in Watermark(tmp_path, "base").earlier_pairs(outs[2])] == ["a", "b"]
    (outs[0] / "pairs.jsonl").unlink()
    assert [p.guard_id for p in Watermark(tmp_path, "base").earlier_pairs(outs[2])] == ["a", "b"]


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    mark = Watermark(tmp_path, "base")
    mark.take(traces("a"), tmp_path)
    mark.commit(tmp_path)
    with (tmp_path / "consumed.jsonl").open("a") as file:
        file.write('{"run": "/torn", "guard_i')
    out = tmp_path / "two"
    out.mkdir()
    mark = Watermark(tmp_path, "base")
    assert ids(mark.take(traces("a", "b"), out)) == ["b"]
    mark.commit(out)
    assert ids(Watermark(tmp_path, "base").new(traces("a", "b", "c"))) == ["c"]
