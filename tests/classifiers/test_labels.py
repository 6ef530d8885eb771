"""Step labels: the shipped ones are whole, and join only with the very text they were made on."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from classifiers.labels import (
    AuthoredTrace,
    TraceLabels,
    TraceText,
    agreement,
    authored_trace,
    join,
    read_authored,
    read_labels,
    text_hash,
)  # fmt: skip

TEXT = "One thing first. Then the other.\nI should not do this."
ROW = TraceLabels(id="t", source="s", sha256=text_hash(TEXT), ends=[16, 32, 54], labels="nct", unsure=[1])


def text(**changes: str) -> TraceText:
    fields = {"id": "t", "source": "s", "request": "r", "request_label": "harmful", "reasoning": TEXT} | changes
    return TraceText.model_validate(fields)


def test_join_cuts_the_text_at_the_ends() -> None:
    (trace,), lost = join([ROW], [text(outcome="comply")])
    assert trace.steps == ("One thing first.", " Then the other.", "\nI should not do this.")
    assert trace.labels == ("neutral", "cue", "trigger")
    assert (trace.kind, trace.outcome, trace.unsure, lost) == ("harmful", "comply", frozenset({1}), Counter())


@pytest.mark.parametrize(
    ("texts", "why"), [([], "no text"), ([text(reasoning=TEXT + " ")], "another text"), ([text(id="u")], "no text")]
)
def test_a_label_without_its_very_text_is_left_out_and_counted(texts: list[TraceText], why: str) -> None:
    assert join([ROW], texts) == ([], Counter({why: 1}))


def test_benign_requests_of_a_named_source_are_alarming() -> None:
    (trace,), _ = join([ROW], [text(request_label="benign")], frozenset({"s"}))
    assert trace.kind == "alarming"


def test_a_letter_that_is_no_label_is_refused() -> None:
    with pytest.raises(ValidationError):
        TraceLabels(id="t", source="s", sha256="0" * 12, ends=[1], labels="x")


@pytest.mark.parametrize("letters", [{"labels": "n"}, {"labels": "nn", "second": "n"}])
def test_letters_and_steps_must_be_as_many(letters: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="one letter for each"):
        TraceLabels.model_validate({"id": "t", "source": "s", "sha256": "0" * 12, "ends": [1, 2]} | letters)


def test_an_authored_line_may_say_which_steps_are_the_answer() -> None:
    line = {"id": "1", "lang": "en", "category": "", "label": "benign", "request": "r", "steps": [["a", "neutral"]] * 3}
    assert authored_trace(AuthoredTrace.model_validate(line)).answer == frozenset()
    assert authored_trace(AuthoredTrace.model_validate(line | {"answer": [1, 2]})).answer == frozenset({1, 2})
    with pytest.raises(ValidationError, match="wanted 0 to 2"):
        AuthoredTrace.model_validate(line | {"answer": [3]})


def test_agreement_counts_only_what_was_labelled_twice() -> None:
    twice = ROW.model_copy(update={"labels": "ncct" * 20, "second": "nctt" * 20, "ends": list(range(80))})
    figures = agreement([ROW, twice])
    assert (figures["same_label"].rate, figures["same_label"].n) == (0.75, 80)
    assert figures["kappa"].rate == pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))
    assert agreement([ROW]) == {}


def test_shipped_labels_are_whole() -> None:
    rows = read_labels()
    assert len(rows) == len({row.id for row in rows}) == 396
    for row in rows:
        assert len(row.labels) == len(row.ends) <= 30
        assert row.ends == sorted(set(row.ends))
        assert row.second is None or len(row.second) == len(row.labels)
        assert all(0 <= step < len(row.labels) for step in row.unsure)
    figures = agreement(rows)
    assert round(figures["kappa"].rate, 3) == 0.931, "docs/labelling.md says so"
    assert figures["kappa"].n == 1169


def test_authored_traces_keep_the_guide() -> None:
    traces = read_authored()
    assert len(traces) == len({trace.id for trace in traces}) == len({trace.request for trace in traces}) == 1721
    assert {trace.language for trace in traces} == {"en", "de", "fr", "es", "zh", "pt", "it", "nl"}
    for trace in traces:
        assert trace.kind == "harmful" or "cue" not in trace.labels, trace.id
    steps = Counter(step for trace in traces for step in trace.steps)
    # Headings and short questions stand in both traces of a twin on purpose; nothing longer is repeated.
    assert [step for step, count in steps.items() if count > 1 and len(step) > 34] == []
    assert max(count for step, count in steps.items() if len(step) > 8) == 2
