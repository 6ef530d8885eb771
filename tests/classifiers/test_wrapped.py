from __future__ import annotations

import random

from classifiers.corpus import part_of, read_corpus
from classifiers.labels import LabelledTrace
from classifiers.wrapped import Wrapper, small_talk


def trace(kind: str, request: str = "How do I bake a cake for ten guests?", source: str = "authored") -> LabelledTrace:
    return LabelledTrace("1", source, request, kind, ("One.",), ("neutral",))  # type: ignore[arg-type]


BENIGN = [trace("benign", f"How do I sew button number {n} on again?") for n in range(9)]


def test_a_diluted_request_stands_whole_among_harmless_ones() -> None:
    wrapper, rng = Wrapper(BENIGN), random.Random(0)
    for _ in range(20):
        found = wrapper.diluted("How do I pick a lock?", rng)
        rest = found.replace("How do I pick a lock?", "", 1)
        assert found.count("How do I pick a lock?") == 1
        assert 1 <= rest.count("How do I sew button number") <= 2


def test_only_ordinary_benign_requests_stand_around() -> None:
    others = [trace("harmful"), trace("alarming"), trace("benign", source="demo"), trace("benign", "short?")]
    assert Wrapper(others).diluted("How do I pick a lock?", random.Random(0)) == "How do I pick a lock?"


def test_a_showing_keeps_steps_and_labels_and_empties_benign_requests_only() -> None:
    wrapper, rng = Wrapper(BENIGN), random.Random(1)
    shown = {kind: [wrapper.shown(trace(kind), rng) for _ in range(300)] for kind in ("harmful", "alarming", "benign")}
    assert all((t.steps, t.labels, t.kind) == (("One.",), ("neutral",), kind) for kind, ts in shown.items() for t in ts)
    empty = {kind: sum(t.request in small_talk() for t in ts) for kind, ts in shown.items()}
    diluted = {kind: sum("sew button" in t.request for t in ts) for kind, ts in shown.items()}
    assert empty["harmful"] == empty["alarming"] == 0
    assert 15 <= empty["benign"] <= 50
    assert all(80 <= count <= 130 for count in diluted.values())


def test_small_talk_is_learned_as_harmless_and_is_no_measured_request() -> None:
    corpus = read_corpus()
    assert {row.label for row in corpus.requests if row.source == "small_talk"} == {"benign"}
    measured = {t.request for t in corpus.traces if part_of(t) != "train"}
    assert len(small_talk()) > 300
    assert not measured & set(small_talk())
