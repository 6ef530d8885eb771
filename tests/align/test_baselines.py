"""Baselines: what the shared prefix changes (nothing, unless the loss averages over tokens); the normalised loss."""

from __future__ import annotations

import math

import pytest
import torch

from align.baselines import BASELINES, baseline_settings, known_baselines, with_prefix
from align.branch import BranchCollator
from align.head import add_branch_head
from align.loss import preference_loss
from align.pairs import Pair
from align.recipe import DEFAULT, read_stages
from align.train import TrainSettings
from guard.errors import UserError
from tests.align.test_loss import random_model, separate_logp

PAIR = Pair(
    id="p", kind="intervened", guard_id="g", request="r", prompt_ids=[5, 6], prefix_ids=[7, 8, 9, 20],
    chosen_ids=[10, 11, 12], rejected_ids=[13, 14], trigger_id="t", chosen_harm=0.0, rejected_harm=1.0,
)  # fmt: skip


def loss_and_gradient(pair: Pair, *, sft_weight: float = 0.0, per_token: bool = False) -> tuple[float, torch.Tensor]:
    """Of one pair under a random model, with the same model's log-probabilities off by a little as the reference."""
    model = random_model()
    row = {"prompt_ids": pair.prompt_ids + pair.prefix_ids, "chosen_ids": pair.chosen_ids}
    row |= {"rejected_ids": pair.rejected_ids}
    batch = BranchCollator(0)([{**row, "index": 0, "offset": 0}])
    del batch["source"]
    reference = random_model(seed=4)
    ref = [torch.tensor([separate_logp(reference, row["prompt_ids"], row[s])]) for s in ("chosen_ids", "rejected_ids")]
    add_branch_head(model)
    chosen, rejected = model(**batch)
    counts = [torch.tensor([len(row[side])]) for side in ("chosen_ids", "rejected_ids")]
    found = preference_loss(
        chosen, rejected, ref[0], ref[1], counts[0], counts[1] if per_token else None, beta=0.5, sft_weight=sft_weight
    )
    found.loss.backward()
    return found.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Their relative distance."""
    return float((a - b).norm() / b.norm())


def test_masking_the_shared_prefix_changes_nothing_under_the_sigmoid_loss() -> None:
    part, full = loss_and_gradient(PAIR), loss_and_gradient(with_prefix(PAIR))
    assert full[0] == pytest.approx(part[0], rel=1e-5)
    assert apart(full[1], part[1]) < 1e-4


@pytest.mark.parametrize("how", [{"sft_weight": 0.2}, {"per_token": True}])
def test_it_matters_where_the_loss_averages_over_tokens(how: dict[str, float]) -> None:
    part, full = loss_and_gradient(PAIR, **how), loss_and_gradient(with_prefix(PAIR), **how)
    assert apart(full[1], part[1]) > 0.05


def test_the_normalised_loss_equals_its_formula() -> None:
    sums = [torch.tensor([value]) for value in (-2.0, -3.0, -2.5, -2.0)]
    found = preference_loss(*sums, torch.tensor([2]), torch.tensor([5]), beta=5.0, sft_weight=0.0)
    margin = (-2.0 + 2.5) / 2 - (-3.0 + 2.0) / 5
    assert found.margin.item() == pytest.approx(margin)
    assert found.loss.item() == pytest.approx(math.log(1 + math.exp(-5.0 * margin)))


def test_without_a_preference_only_the_sft_term_has_a_gradient() -> None:
    settings = baseline_settings(read_stages(DEFAULT), "sft")
    assert (settings.benign, settings.benign_share, settings.contrast) == ("trigger", 0.4, 0.0), "none of our own means"
    assert (settings.scope.steps, settings.epochs) == (None, 3.0), "the rest as the run's last stage"
    alone = baseline_settings([TrainSettings(benign_share=0.0)], "sft")
    assert alone.benign_share == 0.0, "a run without benign pairs has none to give"
    tensors = [torch.tensor([value], requires_grad=True) for value in (-2.0, -3.0)]
    found = preference_loss(
        *tensors, torch.tensor([-2.5]), torch.tensor([-2.0]), torch.tensor([4]), beta=settings.beta,
        sft_weight=settings.sft_weight,
    )  # fmt: skip
    found.loss.backward()
    assert [t.grad.item() if t.grad is not None else 0.0 for t in tensors] == [-0.25, 0.0]


def test_a_whole_output_holds_the_prefix_on_both_sides() -> None:
    whole = with_prefix(PAIR)
    assert (whole.prefix_ids, whole.chosen_ids) == ([], [7, 8, 9, 20, 10, 11, 12])
    assert whole.rejected_ids == [7, 8, 9, 20, 13, 14]
    assert whole.prompt_ids == PAIR.prompt_ids


def test_known_names_and_their_settings() -> None:
    assert known_baselines(" sft, full-dpo,") == ("sft", "full-dpo")
    assert known_baselines("") == ()
    with pytest.raises(UserError, match="wanted names of sft, full-dpo, full-dpo-norm"):
        known_baselines("dpo")
    for changes in BASELINES.values():
        TrainSettings.model_validate(TrainSettings().model_dump() | changes)
