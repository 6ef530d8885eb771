"""The threshold's rule on hand-made traces."""

from __future__ import annotations

import numpy as np
import pytest

from classifiers.data import LabelledStep
from classifiers.threshold import Kind, TraceRow, choose_threshold, demo_traces, flagged_traces, step_traces
from demo.rows import render_rows


def _traces(kind: Kind, source: str, count: int) -> list[TraceRow]:
    return [TraceRow("r", ("s",), kind, str(n), source) for n in range(count)]


def test_a_kind_that_may_not_be_flagged_lies_below_the_threshold() -> None:
    traces = [*_traces("benign", "demo", 3), *_traces("comply", "demo", 1)]
    assert choose_threshold(traces, np.array([0.2, 0.7, 0.6, 0.9]), {"benign": 0.0}) == pytest.approx(0.85)


def test_the_stricter_kind_decides() -> None:
    traces = [*_traces("benign", "demo", 4), *_traces("alarming", "demo", 4)]
    peaks = np.array([0.9, 0.6, 0.1, 0.1, 0.8, 0.7, 0.1, 0.1])
    assert choose_threshold(traces, peaks, {"benign": 0.25, "alarming": 0.5}) == pytest.approx(0.75)
    assert choose_threshold(traces, peaks, {"benign": 0.5, "alarming": 0.25}) == pytest.approx(0.75)
    assert choose_threshold(traces, peaks, {"benign": 0.5, "alarming": 0.5}) == 0.5


def test_sources_count_alike_whatever_their_size() -> None:
    traces = [*_traces("benign", "demo", 2), *_traces("benign", "steps", 10)]
    peaks = np.array([0.6, 0.1, 0.9, 0.8, *[0.1] * 8])
    # 0.9 and 0.8 are a tenth of their source each, a twentieth of the kind; 0.6 is a quarter of the kind.
    assert choose_threshold(traces, peaks, {"benign": 0.1}) == pytest.approx(0.7)
    assert choose_threshold(traces, peaks, {"benign": 0.05}) == pytest.approx(0.85)


def test_never_below_one_half() -> None:
    assert choose_threshold(_traces("benign", "demo", 2), np.array([0.1, 0.2]), {"benign": 0.5}) == 0.5
    assert choose_threshold(_traces("benign", "demo", 2), np.array([0.9, 0.8]), {"benign": 1.0}) == 0.5
    assert choose_threshold([], np.zeros(0), {"benign": 0.01, "alarming": 0.02}) == 0.5


def test_flagged_shares_by_kind_and_source() -> None:
    traces = [*_traces("benign", "demo", 2), *_traces("benign", "steps", 2)]
    rates = flagged_traces(traces, np.array([0.7, 0.1, 0.2, 0.3]), 0.7)
    assert {name: (rate.rate, rate.n) for name, rate in rates.items()} == {
        "flagged_benign_traces": (0.25, 4),
        "flagged_benign_traces_demo": (0.5, 2),
        "flagged_benign_traces_steps": (0.0, 2),
    }


def test_benign_steps_become_traces_of_about_eight() -> None:
    rows = [
        LabelledStep(
            id=str(n),
            request="odd" if n < 20 else "bad",
            step=f"step {n}",
            label="neutral",
            request_label="benign" if n < 20 else "harmful",
            source="x",
            group="g",
            alarming=n < 20,
        )
        for n in range(25)
    ]
    traces = step_traces(rows)
    assert [len(trace.steps) for trace in traces] == [10, 10]
    assert {(trace.request, trace.kind, trace.group) for trace in traces} == {("odd", "alarming", "g")}
    assert {step for trace in traces for step in trace.steps} == {f"step {n}" for n in range(20)}
    assert traces == step_traces(list(reversed(rows)))


def test_demo_rows_become_traces_split_as_live() -> None:
    rows = render_rows("detector")
    traces = demo_traces(rows)
    assert len(traces) == sum(row.shape in {"comply", "benign"} for row in rows)
    assert {trace.kind for trace in traces} == {"comply", "alarming", "benign"}
    assert {len(trace.steps) for trace in traces} == {3, 4, 5, 6}
    first = next(row for row in rows if row.shape == "comply")
    found = next(trace for trace in traces if trace.request == first.request and trace.kind == "comply")
    assert " ".join(found.steps) == first.reasoning
