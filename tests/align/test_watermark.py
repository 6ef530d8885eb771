"""Every trace is taken by one run, an interrupted run takes the same again, and earlier pairs are not lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from align.candidates import RolloutSettings
from align.pairs import Pair, Quota, write_pairs
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
    earlier = Watermark(tmp_path, "base").earlier_pairs(outs[2], [pair("c")])
    assert [(p.guard_id, p.earlier) for p in earlier] == [("b", True), ("a", True)]
    (outs[0] / "pairs.jsonl").unlink()
    assert Watermark(tmp_path, "base").earlier_pairs(outs[2], [pair("c")]) == earlier


def test_repeats_and_quotas_count_over_all_runs_and_the_newest_win(tmp_path: Path) -> None:
    def week(name: str, *pairs: Pair) -> Path:
        out = tmp_path / name
        out.mkdir()
        Watermark(tmp_path, "base").take(traces(name), out)
        write_pairs(pairs, out / "pairs.jsonl")
        return out

    def asked(guard_id: str, request: str, tenant: str = "") -> Pair:
        return pair(guard_id).model_copy(update={"request": request, "tenant": tenant})

    old = week("old", *(asked(f"old-{n}", "weekly?") for n in range(4)), pair("same"), asked("x", "x", "busy"))
    mark = Watermark(tmp_path, "base")
    mark.commit(old)
    mark.commit(week("newer", *(asked(f"newer-{n}", "Weekly? ") for n in range(2)), asked("y", "y", "busy")))
    repeat = pair("same").model_copy(update={"id": "again"})
    own = [asked("own", "weekly?"), repeat, asked("z", "z", "busy")]
    out = week("own", *own)
    assert [p.guard_id for p in mark.earlier_pairs(out, own)] == ["newer-0", "newer-1", "y", "old-0", "x"]
    # A quota that the run's own pairs were kept to holds for the others too.
    strict = week("strict", *own)
    quota = Quota(per_request=2, per_tenant=2)
    (strict / "pairs.settings.json").write_text(RolloutSettings(quota=quota).model_dump_json())
    assert [p.guard_id for p in mark.earlier_pairs(strict, own)] == ["y"]


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
