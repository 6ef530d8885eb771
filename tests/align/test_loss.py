"""The loss against hand-computed values, and the branch row against two separate rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.branch import BranchCollator, pack
from align.head import add_branch_head
from align.loss import preference_loss

PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [12, 13], "index": 0, "offset": 0},
    {"prompt_ids": [5, 6], "chosen_ids": [14], "rejected_ids": [15, 16, 17, 18, 19], "index": 1, "offset": 9},
]


def test_preference_loss_equals_its_formula() -> None:
    chosen, rejected = torch.tensor([-2.0, -4.0]), torch.tensor([-3.0, -1.0])
    ref_chosen, ref_rejected = torch.tensor([-2.5, -4.0]), torch.tensor([-2.0, -2.0])
    result = preference_loss(chosen, rejected, ref_chosen, ref_rejected, torch.tensor([2, 3]), beta=0.5, sft_weight=0.2)
    margins = [(-2.0 + 2.5) - (-3.0 + 2.0), 0.0 - (-1.0 + 2.0)]
    preference = sum(math.log(1 + math.exp(-0.5 * m)) for m in margins) / 2
    assert result.preference.item() == pytest.approx(preference, rel=1e-6)
    assert result.sft.item() == pytest.approx(6.0 / 5, rel=1e-6)
    assert result.loss.item() == pytest.approx(preference + 0.2 * 6.0 / 5, rel=1e-6)
    assert result.margin.item() == pytest.approx(sum(margins) / 2, rel=1e-6)
    assert result.accuracy.item() == 0.5


def test_padding_has_no_place_in_the_table() -> None:
    batch = BranchCollator(0)([PAIRS[1], PAIRS[0] | {"prompt_ids": [5, 6, 7]}, PAIRS[0]])
    assert batch["source"].tolist() == [[*range(9, 17), -1], [*range(8), -1], [*range(9)]]
    assert batch["index"].tolist() == [1, 0, 0]


def test_collator_positions_and_mask() -> None:
    batch = BranchCollator(0)(PAIRS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 5, 6, 14, 15, 16, 17, 18, 19]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 2, 3, 4, 5, 6]]
    sees = [[j for j in range(17) if batch["attention_mask"][0, 0, i, j]] for i in (6, 8, 11, 16)]
    assert sees == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8], [9, 10, 11], [9, 10, 12, 13, 14, 15, 16]]
    flat = list(zip(*(batch[k].tolist() for k in ("pair", "row", "column", "target", "side")), strict=True))
    assert flat[:5] == [(0, 0, 3, 9, 0), (0, 0, 4, 10, 0), (0, 0, 5, 11, 0), (0, 0, 3, 12, 1), (0, 0, 7, 13, 1)]
    assert batch["source"].tolist() == [list(range(17))]
    assert batch["index"].tolist() == [0, 1]
    assert flat[5:8] == [(1, 0, 10, 14, 0), (1, 0, 10, 15, 1), (1, 0, 12, 16, 1)]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([9, 4, 7, 5], [[0, 1], [2, 3]]),
        ([9, 4, 7], [[0], [2, 1]]),
        ([6, 6], [[0], [1]]),
        ([8], [[0]]),
        ([3, 3, 9, 3, 3], [[2, 4], [0, 1, 3]]),
        ([20, 3, 3, 3, 3, 3, 3, 3], [[0], [1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_pieces_share_a_row_where_that_saves_positions(lengths: list[int], rows: list[list[int]]) -> None:
    assert pack(lengths) == rows


@given(st.lists(st.integers(2, 400), min_size=1, max_size=24))
def test_packing_loses_no_piece_and_never_takes_more_than_a_row_each(lengths: list[int]) -> None:
    rows = pack(lengths)
    widths = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(widths) <= 2 * max(lengths)
    assert max(widths) * len(rows) <= max(lengths) * len(lengths)


def random_model(seed: int = 3) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def separate_logp(model: torch.nn.Module, prompt: list[int], side: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + side])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(side))


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], [*PAIRS, *PAIRS[:1]], [*PAIRS, *PAIRS]])
def test_branch_row_gives_the_log_probabilities_of_separate_rows(pairs: list[dict[str, list[int]]]) -> None:
    model = random_model()
    batch = BranchCollator(0)(pairs)
    del batch["source"]
    add_branch_head(model)
    with torch.no_grad():
        chosen, rejected = model(**batch)
    for i, pair in enumerate(pairs):
        for side, branch in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            alone = separate_logp(model, pair["prompt_ids"], pair[side])
            assert branch[i].item() == pytest.approx(alone, abs=1e-4)
