"""Families and languages left out, on the tiny encoder: what is learned from, what is measured, what is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from classifiers import held_out as module
from classifiers.build import BuildConfig, Material, encode_kept
from classifiers.corpus import Corpus, part_of_request
from classifiers.head_fit import score_traces
from classifiers.held_out import groups, held_out
from classifiers.labels import LabelledTrace
from classifiers.measure import choose_threshold
from classifiers.trained import Trained, train_heads
from classifiers.vectors import EncodedTrace, RiskVectors
from tests.classifiers.conftest import QUICK, mixed_traces, tiny_traces


def ids(traces: Sequence[LabelledTrace]) -> set[str]:
    return {trace.id for trace in traces}


def test_heads_learn_from_and_are_chosen_on_the_rest_only(
    mixed: Material, everything: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def spy(
        train: Sequence[EncodedTrace], validation: Sequence[EncodedTrace], risk: RiskVectors, config: BuildConfig
    ) -> Trained:
        seen.append((ids([each.trace for each in train]), ids([each.trace for each in validation])))
        return train_heads(train, validation, risk, config)

    monkeypatch.setattr(module, "train_heads", spy)
    held_out(mixed, everything, QUICK, lambda _: None)
    families = [
        [trace for trace in mixed_traces() if trace.source != "ky295_advbench"],
        [trace for trace in mixed_traces() if trace.source != "authored"],
        [trace for trace in mixed_traces() if trace.language != "de"],
    ]
    assert seen == [
        tuple(
            ids([trace for trace in rest if trace.language != "fr" and part_of_request(trace.request) == part])
            for part in ("train", "val")
        )
        for rest in families
    ]


def test_a_group_is_measured_whole_and_on_its_test_part(mixed: Material, everything: Trained) -> None:
    said: list[str] = []
    found, kept = held_out(mixed, everything, QUICK, said.append)
    assert list(found) == [
        f"{name}, {how}"
        for name in ("R1-Distill-Llama-8B", "authored", "language de")
        for how in ("never seen, all parts", "never seen, test part", "seen, test part")
    ]
    assert said == ["without R1-Distill-Llama-8B", "without authored", "without language de"]
    assert kept == {
        name: f"complying traces: {count}, fewer than 8"
        for name, count in (("DeepSeek-R1", 0), ("EXAONE-4.5-33B", 0), ("demo", 0), ("language fr", 1))
    }
    family = [each for each in mixed.traces if each.trace.source == "ky295_advbench"]
    complying = [each for each in family if "cue" in each.trace.labels]
    tested = [each for each in complying if each.part == "test"]
    counts = [found[f"R1-Distill-Llama-8B, {how}"]["recall_complying_traces"].n
              for how in ("never seen, all parts", "never seen, test part", "seen, test part")]  # fmt: skip
    assert counts == [len(complying), len(tested), len(tested)]
    test_part = [each for each in family if each.part == "test"]
    assert found["R1-Distill-Llama-8B, seen, test part"] == everything.figures(test_part)
    # Both families word their cues alike, so that heads find them unseen.
    assert found["R1-Distill-Llama-8B, never seen, all parts"]["recall_complying_traces"].rate == 1.0


def test_what_leaves_nothing_to_learn_from_is_told(tiny: Path) -> None:
    alone = encode_kept(tiny, Corpus(tiny_traces()), lambda _: None)
    trained = train_heads(alone.of("train"), alone.of("val"), alone.risk, QUICK)
    found, kept = held_out(alone, trained, QUICK, lambda _: None)
    assert found == {}
    assert kept["authored"] == "without it there is nothing to train or validate on"


def test_english_is_never_left_out() -> None:
    assert list(groups([])) == ["DeepSeek-R1", "R1-Distill-Llama-8B", "EXAONE-4.5-33B", "authored", "demo"]


def test_the_threshold_is_chosen_on_validation(mixed: Material, everything: Trained) -> None:
    scored = score_traces(everything.heads, mixed.of("val"))
    assert everything.threshold == choose_threshold(scored, QUICK.allowed)
