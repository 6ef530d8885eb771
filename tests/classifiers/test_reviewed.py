"""What reviewers said of an answer stays the answer's; the rest is tested where the pages are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from classifiers.corpus import part_of_request
from classifiers.reviewed import from_store
from guard.store import reviews
from guard.store.ingest import Ingester
from guard.store.store import Store
from guard.traces import Spool
from tests.classifiers.test_review import kit_model, recorded
from tests.guard import kit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one trace: a calm step and an injected answer to a cue as reasoning, a calm step as answer."""
    trace = recorded("one", substituted=False)
    request = next(asked for n in range(99) if part_of_request(asked := f"How? {n}") == "train")
    steps = [*trace.steps[:3], replace(trace.steps[3], zone="answer")]
    Spool(tmp_path / "traces").append(trace.model_copy(update={"steps": steps, "request": request}))
    found = Store.open(f"sqlite:///{tmp_path}/store.db", migrate=True)
    Ingester(found, tmp_path / "traces").run()
    return found


def test_a_reviewed_step_keeps_its_zone(store: Store, tmp_path: Path) -> None:
    reviews.add(store, "one", 3, "missed", "ann")
    (row,), left_out = from_store(store, kit_model(tmp_path))
    store.close()
    assert not left_out
    assert row.steps == (kit.CALM, kit.CUE, kit.CALM)
    assert (row.labels, row.unlabelled, row.answer) == (("neutral", "neutral", "cue"), {0, 1}, {2})
