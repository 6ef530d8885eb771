"""Attacks keep what a person reads."""

from __future__ import annotations

import pytest

from classifiers.corpus import part_of
from classifiers.labels import LabelledTrace, read_authored
from classifiers.normalise import normalise
from classifiers.perturb import ATTACKS, attacked, rewritten

TRACE = LabelledTrace(
    "1",
    "s",
    "How?",
    "harmful",
    ("I will plan how to steal it.", "It is wrong.", "Then hide."),
    ("cue", "trigger", "cue"),
)


@pytest.mark.parametrize("name", ["capitals", "zero-width", "homoglyphs", "small capitals"])
def test_the_scorers_view_undoes_disguises(name: str) -> None:
    changed = attacked(TRACE, name)
    assert changed.steps != TRACE.steps
    assert [normalise(step) for step in changed.steps] == [normalise(step) for step in TRACE.steps]


def test_the_scorers_view_parts_what_underscores_join() -> None:
    changed = attacked(TRACE, "underscores")
    assert changed.steps[:2] == ("I_will_plan_how_to_steal_it.", "It_is_wrong.")
    assert [normalise(step) for step in changed.steps[:2]] == [normalise(step) for step in TRACE.steps[:2]]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_labels_stay_with_their_steps_and_a_trace_always_looks_the_same(name: str) -> None:
    changed = attacked(TRACE, name)
    assert changed == attacked(TRACE, name)
    assert len(changed.labels) == len(changed.steps)
    kept = [label for label in changed.labels if label != "neutral"]
    assert kept == list(TRACE.labels)
    assert TRACE.request in changed.request


def test_rewritten_traces_fit_theirs_and_are_never_learned_from() -> None:
    traces = {trace.id: trace for trace in read_authored()}
    groups = rewritten()
    assert {how: len(rows) for how, rows in groups.items()} == {"paraphrase": 54, "translation": 54}
    for rows in groups.values():
        for row in rows:
            trace = traces[row.id]
            assert part_of(trace) == "test"
            assert row.applied(trace).labels == trace.labels
    with pytest.raises(ValueError, match="2 steps for 3"):
        groups["paraphrase"][0].model_copy(update={"steps": ["a", "b"]}).applied(TRACE)
