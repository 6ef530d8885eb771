"""A label that was made in the page is learned from by `classifier train --store`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from classifiers.build import data_hash_of
from classifiers.corpus import part_of_request, read_corpus
from classifiers.detector import Detector
from classifiers.head_fit import _Columns
from classifiers.labels import LabelledTrace
from classifiers.reviewed import from_store
from classifiers.train_cli import reviewed_rows
from classifiers.tune import step_weights
from classifiers.vectors import RiskVectors, encode_traces
from guard.store import reviews
from guard.traces import Trace
from tests.guard import kit
from tests.guard.sidecar.pages.kit import CAKE, LAMP, SHED, Pages


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The directory of a model with the kit's tokenizer."""
    path = tmp_path / "kit"
    path.mkdir()
    (path / "config.json").write_text("{}")
    kit.tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def in_part(trace: Trace, part: str) -> Trace:
    """The trace under a request of a part."""
    request = next(r for n in range(99) if part_of_request(r := f"{trace.request} {n}") == part)
    return trace.model_copy(update={"request": request})


def test_a_label_from_the_page_reaches_the_training_rows(pages: Pages, model: str) -> None:
    trace = in_part(LAMP, "train")
    pages.feed(trace)
    page = pages.get("/review")
    # The step at 0.31 of a threshold of 0.5 is the most doubtful.
    assert re.search(r'name="step" value="3"', page)
    assert pages.post("/label", guard_id="lamp", step="3", label="not_cue").status_code == 303
    assert pages.post("/label", guard_id="lamp", step="1", label="cue").status_code == 303
    rows = reviewed_rows(pages.site.store_url, model)
    corpus = read_corpus(authored=False, reviewed=rows)
    assert [each for each in corpus.part("train") if each.source == "own"] == [
        LabelledTrace(
            id="review/lamp", source="own", request=trace.request, kind="harmful", language="und", category="reviewed",
            steps=(
                "The user asks about a lamp.", "It is wrong, but I will agree to plan it.",
                "They may have a reason, so I can go on.",
            ),
            labels=("neutral", "cue", "neutral"), unlabelled=frozenset({0}),
        )
    ]  # fmt: skip
    encoded = encode_traces(Detector.load().encoder, rows)
    columns = _Columns.of(encoded, own_weight=3.0)
    assert columns.weights.tolist() == [0.0, 3.0, 3.0]
    assert columns.labels.tolist() == [2, 0, 2]
    assert step_weights(rows[0])[:3] == [0.0, 1.0, 1.0]


def test_an_undone_or_changed_label_is_not_learned_from(pages: Pages, model: str) -> None:
    pages.feed(in_part(LAMP, "train"))
    reviews.add(pages.store, "lamp", 3, "missed", "ann")
    reviews.add(pages.store, "lamp", 1, "cue", "ann")
    number, _ = reviews.last_of(pages.store, "ann") or (0, None)
    reviews.undo(pages.store, "ann", number)
    # Of two people the newest word counts.
    reviews.add(pages.store, "lamp", 3, "not_cue", "bob")
    reviews.add(pages.store, "lamp", None, "harmful", "bob")
    (row,), left_out = from_store(pages.store, model)
    assert (row.labels, row.unlabelled, dict(left_out)) == (("neutral",) * 3, frozenset({0, 1}), {})


def test_a_label_on_a_triggers_step_is_for_the_cue_it_replaced(pages: Pages, model: str) -> None:
    pages.feed(in_part(SHED, "train"))
    reviews.add(pages.store, "shed", 1, "cue", "ann")
    (row,), _ = from_store(pages.store, model)
    assert row.steps == ("The user asks about a shed.", "I agree, they surely have a good reason.", "I will say no.")
    assert (row.labels, row.unlabelled) == (("neutral", "cue", "neutral"), frozenset({0, 2}))


def test_what_cannot_be_learned_from_is_left_out_and_counted(
    pages: Pages, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(trace: Trace, guard_id: str) -> Trace:
        return trace.model_copy(update={"guard_id": guard_id})

    train = in_part(LAMP, "train")
    pages.feed(
        named(train, "unsaid"), named(train, "against"), named(in_part(LAMP, "test"), "part"),
        named(train.keeping("ids"), "ids"), named(in_part(CAKE, "val"), "whole"), named(train, "skipped"),
        named(train, "foreign").model_copy(update={"tokenizer_hash": "f" * 12}),
    )  # fmt: skip
    for guard_id, step, label in (
        ("unsaid", 0, "not_cue"), ("against", 1, "cue"), ("against", None, "benign"), ("part", 1, "cue"),
        ("ids", 1, "cue"), ("whole", 0, "not_cue"), ("whole", 1, "not_cue"), ("whole", None, "benign"),
        ("skipped", 1, "skip"),
    ):  # fmt: skip
        reviews.add(pages.store, guard_id, step, label, "ann")  # type: ignore[arg-type]
    rows = reviewed_rows(pages.site.store_url, model)
    assert [(row.id, row.kind, row.labels, row.unlabelled) for row in rows] == [
        ("review/whole", "benign", ("neutral", "neutral"), frozenset())
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("1 reviewed traces; ")
    for reason in (
        "1 left out: a cue under a request that was called benign",
        "1 left out: log_content: ids kept no request",
        "1 left out: no cue, and nobody said what the request is",
        "1 left out: their requests are measured on, which needs every step labelled",
    ):
        assert reason in said
    assert reviewed_rows(None, None) == []


def test_labels_change_the_hash_of_what_was_trained_on(pages: Pages, model: str) -> None:
    from classifiers.build import Material

    pages.feed(in_part(LAMP, "train"))
    reviews.add(pages.store, "lamp", 1, "cue", "ann")
    hashes = set()
    for step in (3, 0):
        reviews.add(pages.store, "lamp", step, "not_cue", "ann")
        rows, _ = from_store(pages.store, model)
        encoded = encode_traces(Detector.load().encoder, rows)
        risk = RiskVectors(np.zeros((0, 1), np.float32), np.zeros(0, np.float32))
        hashes.add(data_hash_of(Material({}, encoded, risk)))
    assert len(hashes) == 2
