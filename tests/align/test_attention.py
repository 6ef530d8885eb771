"""Attention of narrow rows, against transformers' own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align import attention
from align.branch import BranchCollator

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip


def module(heads: int, key_heads: int) -> torch.nn.Module:
    made = torch.nn.Module()
    made.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    return made


def inputs(rows: int, heads: int, key_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, as the layers hand them over: a view whose heads are not outermost in memory."""
    shapes = [(rows, width, n, 8) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape).to(dtype).transpose(1, 2).detach().requires_grad_() for shape in shapes]


def branch_mask(rows: int, width: int) -> Tensor:
    """As of a prefix and two branches that do not see each other."""
    mask = torch.ones(rows, 1, width, width, dtype=torch.bool).tril()
    mask[:, :, 2 * width // 3 :, width // 3 : 2 * width // 3] = False
    return mask


def run(
    compute: Any, groups: tuple[int, int], given: list[Tensor], mask: Tensor, scaling: float | None
) -> list[Tensor]:
    """The output and the three gradients, in float32."""
    out, weights = compute(module(*groups), *given, mask, scaling=scaling)
    assert weights is None
    torch.manual_seed(1)
    grads = torch.autograd.grad((out * torch.randn(out.shape).to(out.dtype)).sum(), given)
    return [t.float() for t in (out, *grads)]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 3), groups=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    width=st.integers(1, 33), scaling=st.sampled_from([None, 0.25]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_exact_attention(
    seed: int, rows: int, groups: tuple[int, int], width: int, scaling: float | None
) -> None:
    torch.manual_seed(seed)
    given, mask = inputs(rows, *groups, width, torch.bfloat16), branch_mask(rows, width)
    wide = [t.detach().float().requires_grad_() for t in given]
    exact = run(sdpa_attention_forward, groups, wide, mask, scaling)
    with patch.object(attention, "sdpa_attention_forward", side_effect=AssertionError):
        found = run(attention.attend, groups, given, mask, scaling)
    for ours, true in zip(found, exact, strict=True):
        assert ours.shape == true.shape
        torch.testing.assert_close(ours, true, atol=0.03 * max(1.0, float(true.detach().abs().max())), rtol=0)


@pytest.mark.parametrize("what", ["float32", "wide", "no mask", "additive mask", "a later query", "dropout"])
def test_everything_else_is_left_to_transformers(what: str) -> None:
    width = attention.NARROW + 1 if what == "wide" else 9
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    query, key, value = inputs(1, 6, 2, width, dtype)
    mask: Tensor | None = branch_mask(1, width)
    if what == "no mask":
        mask = None
    elif what == "additive mask":
        mask = torch.zeros(1, 1, width, width, dtype=dtype).masked_fill(~branch_mask(1, width), float("-inf"))
    elif what == "a later query":
        query, mask = query[:, :, -2:], branch_mask(1, width)[:, :, -2:]
    results = []
    for compute in (attention.attend, sdpa_attention_forward):
        torch.manual_seed(0)
        results.append(compute(module(6, 2), query, key, value, mask, 0.5 if what == "dropout" else 0.0)[0])
    assert torch.equal(*results)


def test_a_whole_model_agrees_in_values_and_gradients() -> None:
    rows = [
        {"prompt_ids": list(range(1, 20)), "chosen_ids": [7, 8, 9], "rejected_ids": [30, 31], "index": 0, "offset": 0},
        {"prompt_ids": [5, 6], "chosen_ids": [40], "rejected_ids": [41, 42, 43], "index": 1, "offset": 24},
    ]
    batch = BranchCollator(0)(rows)
    found = []
    for name, calls in (("sdpa", 0), (attention.NAME, SHAPE["num_hidden_layers"])):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
        model.set_attn_implementation(name)
        with patch.object(attention, "_narrow", wraps=attention._narrow) as narrow:
            logits = model(**{k: batch[k] for k in ("input_ids", "position_ids", "attention_mask")}).logits.float()
        assert narrow.call_count == calls
        logits[batch["row"], batch["column"]].log_softmax(-1).sum().backward()
        found.append((logits.detach(), model.get_input_embeddings().weight.grad))
    (stock, stock_grad), (ours, grad) = found
    seen = batch["source"] >= 0
    torch.testing.assert_close(ours[seen], stock[seen], atol=0.02, rtol=0)
    torch.testing.assert_close(grad, stock_grad, atol=0.02 * float(stock_grad.abs().max()), rtol=0)
