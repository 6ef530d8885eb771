"""Trains the heads on vectors: minutes where fine-tuning the encoder takes half an hour."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from classifiers.measure import Scored
from classifiers.network import Heads
from classifiers.tune import PEAK_SHARE, RISK_SHARE, RISKY, Window, peak_loss, step_weights
from classifiers.vectors import EncodedTrace, RiskVectors


@dataclass(frozen=True)
class HeadConfig:
    """Settings of one run over vectors."""

    seed: int = 0
    epochs: int = 20
    """At most; training stops when the validation loss has not fallen for `patience` epochs."""
    patience: int = 3
    lr: float = 1e-4
    weight_decay: float = 0.05
    batch: int = 256
    """Steps in a batch; traces stay whole."""
    requests: int = 64
    """Requests in a batch."""
    own_weight: float = 3.0
    """Of a step of the operator's own traffic."""
    cue_weight: float = 1.0
    """Of a step that is a cue, beside one that is none."""


@dataclass(frozen=True)
class _Columns:
    """Traces one after the other, a row a step."""

    windows: Sequence[Window]
    """The traces, whole."""
    starts: Sequence[int]
    """The row of each trace's first step, and one past the last row."""
    steps: Tensor
    previous: Tensor
    requests: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def of(cls, traces: Sequence[EncodedTrace], own_weight: float = 1.0, cue_weight: float = 1.0) -> _Columns:
        weights = [
            np.array(step_weights(each.trace, cue_weight)) * (own_weight if each.trace.source == "own" else 1.0)
            for each in traces
        ]
        sizes = [len(each.steps) for each in traces]
        return cls(
            [(each.trace, 0, size) for each, size in zip(traces, sizes, strict=True)],
            [0, *np.cumsum(sizes).tolist()],
            torch.from_numpy(np.concatenate([each.steps for each in traces])),
            torch.from_numpy(np.concatenate([each.previous for each in traces])),
            torch.from_numpy(np.concatenate([np.tile(each.request, (len(each.steps), 1)) for each in traces])),
            torch.from_numpy(np.concatenate([each.labels for each in traces])),
            torch.from_numpy(np.concatenate(weights)).float(),
        )

    def batches(self, size: int) -> Iterator[list[int]]:
        """Numbers of whole traces in random order, at least `size` steps a batch but for the last."""
        batch: list[int] = []
        held = 0
        for number in torch.randperm(len(self.windows)).tolist():
            batch.append(number)
            held += self.starts[number + 1] - self.starts[number]
            if held >= size:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def loss(self, heads: Heads, traces: Sequence[int]) -> Tensor:
        """What the steps of some traces cost, each for itself and as the highest of its trace."""
        spans = [range(self.starts[number], self.starts[number + 1]) for number in traces]
        rows = torch.tensor([row for span in spans for row in span])
        owner = torch.tensor([index for index, span in enumerate(spans) for _ in span])
        logits = heads.step_logits(self.steps[rows], self.previous[rows], self.requests[rows])
        each = functional.cross_entropy(logits, self.labels[rows], reduction="none")
        steps = (each * self.weights[rows]).sum() / self.weights[rows].sum().clamp(min=1e-6)
        return steps + PEAK_SHARE * peak_loss(logits, owner, [self.windows[number] for number in traces])


def fit_heads(
    train: Sequence[EncodedTrace],
    validation: Sequence[EncodedTrace],
    risk: RiskVectors,
    config: HeadConfig,
    tick: Callable[[int, int, str], None] = lambda *_: None,
    start: Heads | None = None,
) -> Heads:
    """Return heads trained on `train` and `risk`, from the epoch with the lowest loss on `validation`.

    Training goes on from `start`, which counts as an epoch too, or begins anew. The result is in evaluation mode and
    uncalibrated.
    """
    torch.manual_seed(config.seed)
    heads = copy.deepcopy(start) if start is not None else Heads(train[0].steps.shape[1])
    columns, held = _Columns.of(train, config.own_weight, config.cue_weight), _Columns.of(validation)
    asked = _with_traces(risk, train)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    best, kept, waited = float("inf"), copy.deepcopy(heads.state_dict()), 0
    if start is not None:
        best = _validation_loss(held, heads)
    for epoch in range(config.epochs):
        heads.train()
        for batch in columns.batches(config.batch):
            loss = columns.loss(heads, batch) + RISK_SHARE * _risk_loss(heads, asked, config.requests)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        found = _validation_loss(held, heads)
        tick(epoch + 1, config.epochs, f"validation loss {found:.4f}")
        waited = 0 if found < best else waited + 1
        if found < best:
            best, kept = found, copy.deepcopy(heads.state_dict())
        if waited >= config.patience:
            break
    heads.load_state_dict(kept)
    return heads.eval()


@torch.inference_mode()
def _validation_loss(held: _Columns, heads: Heads) -> float:
    return float(held.loss(heads.eval(), range(len(held.windows))))


def _with_traces(risk: RiskVectors, traces: Sequence[EncodedTrace]) -> RiskVectors:
    own = RiskVectors(
        np.stack([each.request for each in traces]), np.array([RISKY[each.trace.kind] for each in traces], np.float32)
    )
    return risk.joined(own)


def _risk_loss(heads: Heads, risk: RiskVectors, count: int) -> Tensor:
    rows = torch.randint(len(risk.harmful), (count,)).numpy()
    logits = heads.request_logits(torch.from_numpy(risk.vectors[rows]))
    return functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(risk.harmful[rows]))


@torch.inference_mode()
def calibrate(heads: Heads, validation: Sequence[EncodedTrace], risk: RiskVectors) -> Heads:
    """Fit both temperatures on the validation part, so that scores are probabilities."""
    columns, asked = _Columns.of(validation), _with_traces(risk, validation)
    logits = heads.step_logits(columns.steps, columns.previous, columns.requests)
    risks = heads.request_logits(torch.from_numpy(asked.vectors))
    harmful = torch.from_numpy(asked.harmful)
    is_cue = (columns.labels == 0).float()
    grid = [float(t) for t in np.geomspace(0.3, 5.0, 60)]
    cue = [float(functional.binary_cross_entropy((logits / t).softmax(-1)[:, 0], is_cue)) for t in grid]
    risky = [float(functional.binary_cross_entropy_with_logits(risks / t, harmful)) for t in grid]
    heads.temperature.copy_(torch.tensor([grid[int(np.argmin(losses))] for losses in (cue, risky)]))
    return heads


@torch.inference_mode()
def score_traces(heads: Heads, traces: Sequence[EncodedTrace]) -> list[Scored]:
    """Return each trace with the scores that the heads give its steps."""
    found = []
    for each in traces:
        request = torch.from_numpy(each.request).expand(len(each.steps), -1)
        scores = heads(torch.from_numpy(each.steps), torch.from_numpy(each.previous), request)[:, 0]
        found.append(Scored(each.trace, scores.numpy().astype(float), each.ends, each.part))
    return found
