"""Log-probabilities under a head that does not train, against stock cross-entropy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from align import token_logps as module
from align.token_logps import token_logps


def head(width: int = 8, vocabulary: int = 40, bias: bool = False, frozen: bool = True) -> nn.Linear:
    made = nn.Linear(width, vocabulary, bias=bias)
    return made.requires_grad_(not frozen)


def both(tokens: int, made: nn.Linear) -> list[tuple[Tensor, Tensor]]:
    """Values and gradients of a weighted sum, ours and stock."""
    hidden, target, weights = torch.randn(tokens, 8), torch.randint(0, 40, (tokens,)), torch.randn(tokens)
    found = []
    for compute in (token_logps, stock):
        leaf = hidden.clone().requires_grad_()
        values = compute(leaf, made, target)
        (values * weights).sum().backward()
        assert leaf.grad is not None
        found.append((values.detach(), leaf.grad))
    return found


def stock(hidden: Tensor, made: nn.Linear, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(made(hidden), target, reduction="none")


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 23), at_a_time=st.sampled_from([40, 200, 10**6]))
def test_values_and_gradients_are_those_of_cross_entropy(seed: int, tokens: int, at_a_time: int) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS", at_a_time)
        mine, theirs = both(tokens, head())
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["trained", "bias", "hooked", "replaced", "wrapped"])
def test_any_other_head_is_called_as_it_is(kind: str) -> None:
    torch.manual_seed(1)
    made = head(bias=kind == "bias", frozen=kind != "trained")
    calls: list[nn.Module] = []
    if kind == "hooked":
        made.register_forward_hook(lambda module, *_: calls.append(module))
    if kind == "replaced":
        inner = made.forward
        made.forward = lambda hidden: (calls.append(made), inner(hidden))[1]  # type: ignore[method-assign]
    called = nn.Sequential(made) if kind == "wrapped" else made
    hidden, target = torch.randn(5, 8, requires_grad=True), torch.randint(0, 40, (5,))
    values = token_logps(hidden, called, target)
    assert len(calls) == (kind in ("hooked", "replaced"))
    torch.testing.assert_close(values, stock(hidden, made, target), rtol=0, atol=0)
    values.sum().backward()
    assert (made.weight.grad is not None) == (kind == "trained")


def test_in_bf16_the_gradient_has_the_hidden_states_format() -> None:
    torch.manual_seed(2)
    made = head().to(torch.bfloat16)
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 40, (6,))
    values = token_logps(hidden, made, target)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = hidden.detach().float().requires_grad_()
    stock(exact, made.float(), target).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=0.05, atol=0.02)


def test_without_gradients_nothing_is_kept() -> None:
    made, target = head(), torch.randint(0, 40, (5,))
    with torch.no_grad():
        values = token_logps(torch.randn(5, 8, requires_grad=True), made, target)
    assert values.grad_fn is None
    assert not values.requires_grad
