"""Fine-tuning on the tiny encoder: what it learns from, which epoch is kept, when it stops."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from classifiers.build import _score_in_torch, tune_network
from classifiers.corpus import Corpus
from classifiers.labels import LabelledTrace
from classifiers.measure import Scored
from classifiers.network import StepNetwork
from classifiers.tune import (
    UNSURE_WEIGHT,
    TuneConfig,
    Tuned,
    disguise_source,
    peak_loss,
    step_loss,
    step_weights,
    tune,
)
from tests.classifiers.conftest import TINY, tiny_traces


def test_frozen_layers_stay_and_a_run_repeats(tiny_base: Path) -> None:
    traces = tiny_traces()[:12]
    config = TuneConfig(epochs=1, frozen_layers=2)
    first, second = (tune(tiny_base, traces, [], lambda _: 0.0, config).network for _ in range(2))
    start = StepNetwork(tiny_base, 2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(
        first.encoder.encoder.layer[1].output.dense.weight, start.encoder.encoder.layer[1].output.dense.weight
    )
    assert not torch.equal(
        first.encoder.encoder.layer[2].output.dense.weight, start.encoder.encoder.layer[2].output.dense.weight
    )


def tune_on(
    values: Sequence[float], tiny_base: Path, epochs: int, patience: int
) -> tuple[Tuned, list[torch.Tensor], list[str]]:
    """A run whose validation says these values: its end, the weights it measured, and what it said after each epoch."""
    left, seen, said = iter(values), list[torch.Tensor](), list[str]()

    def validate(network: StepNetwork) -> float:
        seen.append(network.heads.risk.weight.detach().clone())
        return next(left)

    def tick(done: int, total: int, what: str) -> None:
        if "validation" in what:
            said.append(what)

    config = TuneConfig(epochs=epochs, patience=patience)
    return tune(tiny_base, tiny_traces()[:12], [], validate, config, tick), seen, said


def test_the_best_epoch_is_kept(tiny_base: Path) -> None:
    tuned, seen, said = tune_on([0.9, 0.5, 0.1], tiny_base, epochs=3, patience=9)
    assert torch.equal(tuned.network.heads.risk.weight, seen[0])
    assert not torch.equal(seen[0], seen[2])
    assert tuned[1:] == (1, 3, "all epochs ran")
    assert said == [
        "epoch 1 of 3, validation 0.9000, best 0.9000 in epoch 1",
        "epoch 2 of 3, validation 0.5000, best 0.9000 in epoch 1",
        "epoch 3 of 3, validation 0.1000, best 0.9000 in epoch 1",
    ]


def test_training_stops_when_no_epoch_is_as_good_as_the_best(tiny_base: Path) -> None:
    """The second of two that rank alike is kept, and waiting begins anew with it."""
    values = [0.5, 0.8, 0.7, 0.8, 0.7, 0.6, 0.9, 0.9]
    tuned, seen, _ = tune_on(values, tiny_base, epochs=8, patience=2)
    assert len(seen) == 6
    assert tuned[1:] == (4, 6, "validation below its best for 2 epochs")
    assert torch.equal(tuned.network.heads.risk.weight, seen[3])
    assert not tuned.network.training


def test_a_run_that_stops_early_is_the_beginning_of_the_one_that_does_not(tiny_base: Path) -> None:
    falling = [0.9, 0.5, 0.4, 0.3]
    early, begun, _ = tune_on(falling, tiny_base, epochs=4, patience=1)
    whole, seen, _ = tune_on(falling, tiny_base, epochs=4, patience=4)
    assert (len(begun), len(seen)) == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(begun, seen, strict=False))
    for name, value in early.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[name]), name


def test_what_is_measured_on_the_way_is_the_validation_part(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, measured = Corpus(tiny_traces()), list[str]()

    def listen(network: StepNetwork, trace: LabelledTrace) -> Scored:
        measured.append(trace.id)
        return _score_in_torch(network, trace)

    monkeypatch.setattr("classifiers.build._score_in_torch", listen)
    config = replace(TINY, tune=replace(TINY.tune, epochs=2))
    tuned = tune_network(corpus, tiny_base, config, lambda *_: None)
    assert measured == [trace.id for trace in corpus.part("val")] * tuned.ran


def test_step_loss_weighs_doubtful_steps_less() -> None:
    trace = LabelledTrace("1", "s", "r", "harmful", ("a", "b", "c"), ("cue", "trigger", "neutral"), frozenset({1}))
    logits = torch.tensor([[2.0, 0, 0], [0.5, 1, 0]])
    each = functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    wanted = (each[0] + UNSURE_WEIGHT * each[1]) / (1 + UNSURE_WEIGHT)
    assert step_loss(logits, [(trace, 0, 2)]).item() == pytest.approx(wanted.item())


def test_a_cue_weighs_what_it_is_told_to() -> None:
    trace = LabelledTrace("1", "s", "r", "harmful", ("a", "b", "c"), ("cue", "trigger", "cue"), frozenset({2}))
    assert step_weights(trace, 3.0) == [3.0, 1.0, 3.0 * UNSURE_WEIGHT]
    logits = torch.tensor([[2.0, 0, 0], [0.5, 1, 0]])
    each = functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    assert step_loss(logits, [(trace, 0, 2)], 3.0).item() == pytest.approx(((3 * each[0] + each[1]) / 4).item())


def test_a_peak_costs_what_the_whole_trace_should_have_been() -> None:
    """Two traces: one with a cue, one harmless; the soft maximum and the cross entropy written out by hand."""
    cue = LabelledTrace("1", "s", "r", "harmful", ("a", "b"), ("cue", "neutral"))
    calm = LabelledTrace("2", "s", "r", "alarming", ("c",), ("neutral",))
    logits = torch.tensor([[2.0, 0, 0], [0.5, 1, 0], [1.0, 0, 0]])
    odds = [2 - math.log(2), 0.5 - math.log(math.e + 1), 1 - math.log(2)]
    peak = math.log(math.exp(2 * odds[0]) + math.exp(2 * odds[1])) / 2 - 1
    wanted = (math.log1p(math.exp(-peak)) + math.log1p(math.exp(odds[2] - 1))) / 2
    owner = torch.tensor([0, 0, 1])
    assert peak_loss(logits, owner, [(cue, 0, 2), (calm, 0, 1)]).item() == pytest.approx(wanted)


def test_what_nobody_labelled_is_no_part_of_a_peak() -> None:
    half = LabelledTrace("1", "s", "r", "alarming", ("a", "b"), ("neutral", "neutral"), unlabelled=frozenset({1}))
    none = dataclasses.replace(half, unlabelled=frozenset({0, 1}))
    calm, loud = torch.tensor([[0.0, 1, 0], [0, 0, 0]]), torch.tensor([[0.0, 1, 0], [9, 0, 0]])
    owner = torch.tensor([0, 0])
    assert peak_loss(calm, owner, [(half, 0, 2)]) == peak_loss(loud, owner, [(half, 0, 2)])
    assert peak_loss(loud, owner, [(none, 0, 2)]) == 0


def test_a_harmful_request_thought_about_without_a_cue_weighs_less() -> None:
    calm = LabelledTrace("1", "s", "r", "alarming", ("a",), ("neutral",))
    safe = dataclasses.replace(calm, kind="harmful")
    logits, owner = torch.tensor([[3.0, 0, 0]]), torch.tensor([0])
    whole, less = (peak_loss(logits, owner, [(trace, 0, 1)]).item() for trace in (calm, safe))
    assert less == pytest.approx(0.3 * whole)


def test_the_giveaway_word_of_a_source_is_disguised() -> None:
    trace = LabelledTrace("1", "star1", "r", "harmful", ("x",), ("neutral",))
    rng = random.Random(0)
    seen = {disguise_source(trace, "The safety policy says no.", rng) for _ in range(60)}
    assert len(seen) == 5
    assert disguise_source(replace(trace, source="exaone45"), "The policy says no.", rng) == "The policy says no."
