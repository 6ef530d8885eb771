"""What the demo reasoner learns from: whole rows by their weights, crossings by all that may follow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demo.build_reasoner import CROSSING_WEIGHT, HEAD_WEIGHT, PARTS, Example, batches, encode, weighted_loss
from demo.model import ADAPTER
from demo.rows import Row, render_crossings, render_rows


def tiny_causal() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def test_loss_is_the_weighted_mean_of_tokens_and_of_what_may_follow() -> None:
    causal = tiny_causal()
    rows = [
        Example([1, 2, 3], [4, 5, 6], [0.0, 3.0, 1.0]),
        Example([7, 8], [9], [0.0], following=(10, 11, 11)),
    ]
    got = weighted_loss(SimpleNamespace(get_base_model=lambda: causal), rows, pad=0)
    long = causal(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0].log_softmax(-1)
    short = causal(torch.tensor([[7, 8, 9]])).logits[0].log_softmax(-1)
    follows = -(short[2, 10] + 2 * short[2, 11]) / 3
    wanted = (-3 * long[3, 5] - long[4, 6] + CROSSING_WEIGHT * follows) / (4 + CROSSING_WEIGHT)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_given_trigger_is_not_learned_and_what_follows_is(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    steps = (("open", "So it is."), ("trigger", "Stop now."), ("decide", "I say no."))
    given = encode(tokenizer, Row("t", "harmful", "refuse", "r", steps, "No.", given_trigger=True))
    learned = encode(tokenizer, Row("t", "harmful", "refuse", "r", steps, "No."))
    sizes = [len(tokenizer.encode(text, add_special_tokens=False)) for text in ("So it is.", " Stop now.")]
    opening, trigger = slice(0, sizes[0]), slice(sizes[0], sum(sizes))
    assert given.completion == learned.completion
    assert given.weights[trigger] == [0.0] * sizes[1]
    assert learned.weights[trigger][0] == given.weights[trigger.stop] == HEAD_WEIGHT
    assert set(given.weights[opening]) == {1.0}
    assert given.weights[trigger.stop :] == learned.weights[trigger.stop :]
    assert len(given.weights) == len(given.completion)


def test_batches_hold_every_row_once_and_keep_to_the_tokens() -> None:
    rows = [Example([1] * (3 + i % 7), [2] * (5 + i % 11), [1.0] * (5 + i % 11)) for i in range(60)]
    found = list(batches(rows, 64, random.Random(0)))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    assert all(max(map(len, batch)) * len(batch) <= 64 for batch in found)


def test_the_shipped_adapter_learned_as_many_rows_as_there_are() -> None:
    learned = json.loads((ADAPTER / "training.json").read_text(encoding="utf-8"))["rows"]
    assert learned == sum(len(render_rows(part)) + len(render_crossings(part)) for part in PARTS)
