"""The split, and what is read into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.corpus import pair_part, pair_requests, part_of, part_of_request, read_corpus, read_pairs
from classifiers.labels import LabelledTrace, read_authored
from classifiers.normalise import normalise
from guard.errors import UserError


def _trace(request: str, source: str = "authored", language: str = "en") -> LabelledTrace:
    return LabelledTrace("1", source, request, "benign", ("x",), ("neutral",), language=language)


def test_parts_are_frozen() -> None:
    """These must never change: an old detector was trained on what they say."""
    requests = [f"request {number}" for number in range(12)]
    assert [part_of_request(request) for request in requests] == EXPECTED


EXPECTED = ["val", "test", "test", "train", "train", "train", "test", "train", "test", "test", "train", "train"]


@given(st.text(max_size=40))
def test_a_requests_spelling_does_not_move_it(request_text: str) -> None:
    assert part_of_request(f"  {request_text} ") == part_of_request(request_text)


def test_unseen_families_and_languages_are_measured_only() -> None:
    for number in range(50):
        request = f"request {number}"
        assert part_of(_trace(request, source="exaone45")) == "test"
        assert part_of(_trace(request, language="fr")) == "test"
        assert part_of(_trace(request, source="demo")) == "train"
        assert part_of(_trace(request)) == part_of_request(request)
        assert part_of(_trace(request, "own", "fr")) == part_of_request(request)


def test_no_request_is_in_two_parts_and_no_measured_request_teaches_risk() -> None:
    corpus = read_corpus()
    parts = {part: {normalise(trace.request) for trace in corpus.part(part)} for part in ("train", "val", "test")}
    assert not parts["val"] & parts["test"]
    learned = parts["train"] | {normalise(row.request) for row in corpus.requests}
    assert not learned & (parts["val"] | parts["test"])


def test_pairs_are_split_whole() -> None:
    pairs = read_pairs()
    assert len({pair.id for pair in pairs}) == len(pairs)
    learned = {row.request for row in pair_requests("train")}
    for pair in pairs:
        assert (pair.harmful in learned) == (pair.benign in learned) == (pair_part(pair) == "train")


def test_own_traces_join_and_bad_lines_are_named(tmp_path: Path) -> None:
    line = {
        "id": "mine",
        "lang": "en",
        "category": "",
        "label": "benign",
        "request": "Bake",
        "steps": [["Mix.", "neutral"]],
    }
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(line) + "\n")
    corpus = read_corpus(own=[path], authored=False)
    assert [trace.id for trace in corpus.traces if trace.source == "own"] == ["mine"]
    assert corpus.own == {"train": 0, "val": 0, "test": 0} | {part_of_request("Bake"): 1}
    path.write_text(json.dumps(line | {"label": "odd"}) + "\n")
    with pytest.raises(UserError, match=r"own\.jsonl line 1 is malformed at label"):
        read_corpus(own=[path])


def test_without_authored_traces_the_measured_parts_stay_whole() -> None:
    everything, less = read_corpus(), read_corpus(authored=False)
    assert {trace.source for trace in less.part("train")} == {"demo"}
    for part in ("val", "test"):
        assert [trace.id for trace in less.part(part)] == [trace.id for trace in everything.part(part)]
    assert not less.requests


def test_authored_traces_are_sound() -> None:
    traces = read_authored()
    assert len({trace.id for trace in traces}) == len(traces)
    for trace in traces:
        assert trace.kind == "harmful" or "cue" not in trace.labels, trace.id
        assert all(step.strip() for step in trace.steps), trace.id
