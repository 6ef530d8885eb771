"""Assembling public sets; the hub is the one thing that is played here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from classifiers import sources
from classifiers.data import read_requests
from classifiers.labels import TraceLabels, read_texts, text_hash
from classifiers.sources import SOURCES, UNVERSIONED, Source, assemble, load_from_hub


def hub(source: Source) -> Iterable[Mapping[str, Any]]:
    """Two rows a set; one set is out of reach."""
    if source.name == "advbench":
        raise ConnectionError("no hub")
    if source.response:
        return [
            {"question": "Q1", "response": "<think>\nI must not help.\n</think> No."},
            {"question": "Q2", "response": "<think>Unknown reasoning.</think> No."},
        ]
    return [{"prompt": f"{source.name} one"}, {"prompt": f"{source.name} two"}]


def test_texts_are_matched_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = TraceLabels(id="star1-7", source="star1", sha256=text_hash("I must not help."), ends=[16], labels="t")
    monkeypatch.setattr(sources, "read_labels", lambda: [label])
    told = assemble(tmp_path, lambda _: None, hub)
    (text,) = read_texts(tmp_path / "traces.jsonl")
    assert (text.id, text.request, text.reasoning) == ("star1-7", "Q1", "I must not help.")
    requests = read_requests(tmp_path / "requests.jsonl")
    assert {(row.source, row.label) for row in requests} == {
        ("coconot", "benign"), ("orbench_hard", "benign"), ("simplesafetytests", "harmful"),
    }  # fmt: skip
    assert any("advbench: not assembled (ConnectionError: no hub)" in line for line in told)
    assert "star1 (newest version): 1 of 2 rows" in told
    assert "simplesafetytests (98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5): 2 of 2 rows" in told


def test_without_the_hub_nothing_is_written(tmp_path: Path) -> None:
    def dead(_: Source) -> Iterable[Mapping[str, Any]]:
        raise OSError("unreachable")

    told = assemble(tmp_path / "out", lambda _: None, dead)
    assert not (tmp_path / "out").exists()
    assert len(told) == len(SOURCES)


def test_the_hub_is_asked_for_the_listed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[str | None, str, str | None]] = {}

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> list[object]:
        asked[name] = (config, split, revision)
        return []

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in SOURCES:
        if source.hub:
            load_from_hub(source)
    assert asked == {
        "UCSC-VLAA/STAR-1": (None, "train", None),
        "walledai/AdvBench": (None, "train", "9d4730540082fa4017450b65ca1c0e1d8d30446e"),
        "allenai/coconot": ("contrast", "test", "2cbe16aabf9069f17e48c8daad8aeabc29469eb7"),
        "bench-llm/or-bench": ("or-bench-hard-1k", "train", "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"),
        "Bertievidgen/SimpleSafetyTests": (None, "test", "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5"),
    }


def test_every_source_has_a_commit_or_says_that_none_is_published() -> None:
    unversioned = {source.name for source in SOURCES if source.revision is None}
    assert unversioned == {source.name for source in SOURCES if source.version == UNVERSIONED} == {"star1", "exaone45"}


def test_every_source_of_the_labels_is_listed() -> None:
    listed = {source.name for source in SOURCES}
    labelled = {json.loads(line)["source"] for line in LABELS.read_text().splitlines()}
    assert labelled <= listed
    assert all(source.licence for source in SOURCES)


LABELS = Path(sources.__file__).parent / "labels" / "steps.jsonl"
