"""Exact figures of small hand-made scorings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.compare import compare
from classifiers.labels import Kind, Label, LabelledTrace
from classifiers.measure import Scored, calibration_error, choose_threshold, figures, slices


def scored(kind: Kind, labels: str, *scores: float, outcome: str = "unknown", name: str = "") -> Scored:
    """A trace with one score for each letter of `labels`; every step has ten tokens."""
    letters: dict[str, Label] = {"c": "cue", "t": "trigger", "n": "neutral"}
    trace = LabelledTrace(
        id=name or f"{kind}/{labels}/{scores}", source="s", request="r", kind=kind, steps=("x",) * len(labels),
        labels=tuple(letters[letter] for letter in labels), outcome=outcome,
    )  # fmt: skip
    return Scored(trace, np.array(scores), np.arange(1, len(labels) + 1) * 10)


TRACES = [
    scored("harmful", "nc", 0.2, 0.9),
    scored("harmful", "ncc", 0.1, 0.4, 0.8),
    scored("harmful", "nt", 0.3, 0.95),
    scored("harmful", "ct", 0.6, 0.2, outcome="refuse"),
    scored("alarming", "nn", 0.1, 0.75),
    scored("alarming", "nn", 0.1, 0.2),
    scored("benign", "n", 0.05),
]


def test_figures_of_traces_and_steps() -> None:
    found = figures(TRACES, 0.7)
    shares = {name: (rate.rate, rate.n) for name, rate in found.items() if not name.startswith("auroc")}
    assert shares == {
        "recall_complying_traces": (1.0, 2),
        "flagged_benign_traces": (0.0, 1),
        "flagged_alarming_traces": (0.5, 2),
        "flagged_deliberating_traces": (0.5, 2),
        "flagged_cue_steps_harmful": (0.5, 4),
        "flagged_neutral_steps_benign": (0.2, 5),
        "flagged_neutral_steps_harmful": (0.0, 3),
        "flagged_trigger_steps_harmful": (0.5, 2),
        "detected_within_128_tokens": (1.0, 2),
        "median_tokens_to_detection": (25.0, 2),
    }
    # Cues 0.9 0.4 0.8 0.6 against benign steps 0.1 0.75 0.1 0.2 0.05: 18 of 20 pairs are in order.
    assert found["auroc_cue_vs_benign"].rate == pytest.approx(18 / 20)
    # Safe deliberation is steps of refused or cue-free traces that are no cues: 0.3 0.95 0.2.
    assert found["auroc_cue_vs_deliberation"].rate == pytest.approx(8 / 12)


def test_a_missed_trace_is_not_early() -> None:
    found = figures([scored("harmful", "nc", 0.1, 0.9), scored("harmful", "nc", 0.1, 0.2)], 0.5)
    assert (found["detected_within_128_tokens"].rate, found["median_tokens_to_detection"].n) == (0.5, 1)


def test_the_threshold_flags_no_more_than_allowed() -> None:
    benign = [scored("benign", "n", value / 100) for value in range(100)]
    assert choose_threshold(benign, {"benign": 0.05}) == pytest.approx(0.945, abs=5e-4)
    assert sum(each.peak >= choose_threshold(benign, {"benign": 0.05}) for each in benign) == 5
    assert choose_threshold(benign, {"benign": 0.9}) == 0.5
    assert choose_threshold(benign, {"alarming": 0.0}) == 0.5
    assert 0.99 < choose_threshold(benign, {"benign": 0.0}) < 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 0.5))
def test_no_more_than_the_allowed_share_is_ever_flagged(peaks: list[float], share: float) -> None:
    traces = [scored("benign", "n", peak) for peak in peaks]
    flagged = sum(each.peak >= choose_threshold(traces, {"benign": share}) for each in traces)
    # A share that is a whole number but for its rounding counts as that number: 0.3 of 10 is 3.
    assert flagged <= share * len(peaks) + 1e-9 + sum(peak > 1 - 2e-6 for peak in peaks)


def test_calibration_error() -> None:
    assert calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([1.0, 0, 0, 0])) == 0
    assert calibration_error(np.array([0.9, 0.1]), np.array([0.0, 0])) == pytest.approx(0.5)
    assert calibration_error(np.array([1.0]), np.array([1.0])) == 0


def test_slices_hold_every_trace_once_a_view() -> None:
    groups = slices(TRACES)
    assert {name: len(part) for name, part in groups.items()} == {
        "language en": 7, "source s": 7, "up to 12 steps": 7,
    }  # fmt: skip


def test_compare_pairs_traces() -> None:
    worse = [Scored(each.trace, each.scores * 0.5, each.ends) for each in TRACES]
    found = {each.name: each for each in compare(TRACES, worse, (0.7, 0.7))}
    recall = found["recall_complying_traces"]
    assert (recall.first, recall.second, recall.change.rate, recall.verdict) == (1.0, 0.0, -1.0, "worse")
    assert found["flagged_alarming_traces"].verdict in {"better", "even"}
    assert found["auroc_step"].change.rate == 0
    assert not any(each.worse for each in compare(TRACES, TRACES, (0.7, 0.7)))
    with pytest.raises(ValueError, match="the same traces"):
        compare(TRACES, TRACES[1:], (0.7, 0.7))
