"""Replays of traces whose policy did not keep everything."""

from __future__ import annotations

from guard.replay import replay
from tests.guard.recorded import CALM, CUE, FREE, live, reader, runtime


def test_a_request_that_was_not_kept_is_read_from_the_prompt() -> None:
    run = runtime(FREE)
    traces = [live(CALM + CUE + CALM, run=run, request=request, guard_id=request) for request in ("car", "bread")]
    kept = [trace.keeping("ids") for trace in traces]
    restored = [reader().restored(trace) for trace in kept]
    assert [trace.request for trace in kept] == ["", ""]
    assert [trace.request for trace in restored] == ["car", "bread"]
    # These scores hang on the request: without it, nothing would come out as it was recorded.
    assert replay(restored, run, reader()).exact.differing == []
    assert replay(kept, run, reader()).exact.differing == ["car", "bread"]


def test_a_trace_without_ids_is_skipped() -> None:
    run = runtime(FREE)
    trace = live(CALM, run=run)
    assert reader().restored(trace) is trace
    assert replay([trace.keeping("none"), trace], run, reader()).skipped == {"no token ids kept": 1}
