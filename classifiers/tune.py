"""Fine-tunes the encoder with its heads on labelled traces: windows of consecutive steps, each beside its request.

A batch holds windows of a few traces and some requests for the risk alone. Every epoch is measured on the validation
part; the best one is kept, and training stops when none has been as good for a while.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from classifiers.data import LabelledRequest
from classifiers.labels import Kind, LabelledTrace
from classifiers.network import StepNetwork
from classifiers.vectors import LABELS
from classifiers.wrapped import Wrapper

Tick = Callable[[int, int, str], None]
"""Called with (done, total, what it says) as training goes on."""
RISKY: dict[Kind, float] = {"harmful": 1.0, "alarming": 0.0, "benign": 0.0}
UNSURE_WEIGHT = 0.4
"""Of a step that its labeller doubted."""
RISK_SHARE = 0.5
"""Weight of the request's loss beside the steps'."""
PEAK_SHARE = 1.0
"""Weight of the peaks' loss beside the steps'."""
_SHARP, _HIGH = 2.0, 1.0
"""How close the soft maximum is to the highest step, and the log-odds of a step that answers for its trace."""
_DELIBERATING = 0.3
"""Weight of the peak of a trace that weighs a harmful request and holds no cue."""
_POLICY = re.compile(r"\b(?:safety )?(?:polic(?:y|ies)|guidelines)\b", re.IGNORECASE)
_INSTEAD = ("rules", "principles", "instructions", "values")
POLICY_SOURCES = frozenset({"star1"})
"""Nearly all reasonings of these were told to cite a policy: an artefact that must not become a feature."""


@dataclass(frozen=True)
class TuneConfig:
    """Settings of one fine-tuning run."""

    seed: int = 0
    epochs: int = 5
    """At most; training stops when validation has stayed below its best for `patience` epochs."""
    patience: int = 2
    lr: float = 1e-4
    head_lr: float = 1e-3
    frozen_layers: int = 3
    window: int = 12
    """Steps of one trace in a batch."""
    traces: int = 6
    """Traces in a batch."""
    requests: int = 16
    """Requests in a batch that only teach risk."""
    cue_weight: float = 1.0
    """Of a step that is a cue, beside one that is none."""


Window = tuple[LabelledTrace, int, int]


class Tuned(NamedTuple):
    """A fine-tuned network and how its training went; epochs are counted from 1."""

    network: StepNetwork
    kept: int
    """The epoch whose weights these are."""
    ran: int
    """The last epoch that was trained."""
    why: str
    """Why it was the last."""


def tune(
    base: Path,
    traces: Sequence[LabelledTrace],
    requests: Sequence[LabelledRequest],
    validate: Callable[[StepNetwork], float],
    config: TuneConfig,
    tick: Tick = lambda *_: None,
) -> Tuned:
    """Return the network of the epoch with the highest `validate`, in evaluation mode.

    The learning rate falls over all of `epochs`, so a run that stops early is the beginning of the one that does not.
    ValueError without traces. Two runs of one configuration on one machine give the same weights.
    """
    if not traces:
        raise ValueError("fine-tuning needs labelled traces")
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    network, wrapper = StepNetwork(base, config.frozen_layers), Wrapper(traces)
    optimiser, schedule, total = _optimiser(network, len(_windows(traces, config, rng)), config)
    best, kept, at, done = float("-inf"), copy.deepcopy(network.state_dict()), 0, 0
    why = "all epochs ran"
    for epoch in range(1, config.epochs + 1):
        network.learning()
        windows = _windows(traces, config, rng)
        for start in range(0, len(windows), config.traces):
            shown = [(wrapper.shown(trace, rng), a, b) for trace, a, b in windows[start : start + config.traces]]
            drawn = rng.sample(requests, min(config.requests, len(requests)))
            asked = [(wrapper.asked(row, rng), float(row.label == "harmful")) for row in drawn]
            loss = _loss(network, shown, asked, config.cue_weight, rng)
            _improve(network, loss, optimiser, schedule)
            done += 1
            tick(done, total, f"epoch {epoch} of {config.epochs}, loss {loss.item():.3f}")
        found = validate(network.eval())
        # Of epochs that rank alike the last: its probabilities are the best learned.
        if found >= best:
            best, kept, at = found, copy.deepcopy(network.state_dict()), epoch
        tick(done, total, f"epoch {epoch} of {config.epochs}, validation {found:.4f}, best {best:.4f} in epoch {at}")
        if epoch - at >= config.patience:
            why = f"validation below its best for {config.patience} epochs"
            break
    network.load_state_dict(kept)
    return Tuned(network.eval(), at, epoch, why)


def _improve(
    network: StepNetwork,
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """One step down the gradient of a batch's loss."""
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    schedule.step()


def _optimiser(
    network: StepNetwork, windows: int, config: TuneConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR, int]:
    body = [each for each in network.encoder.parameters() if each.requires_grad]
    groups = [{"params": body, "lr": config.lr}, {"params": list(network.heads.parameters()), "lr": config.head_lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    total = -(-windows // config.traces) * config.epochs
    warmup = max(1.0, 0.08 * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / total))
    )
    return optimiser, schedule, total


def _windows(traces: Sequence[LabelledTrace], config: TuneConfig, rng: random.Random) -> list[Window]:
    """Cut every trace into windows, at another offset each epoch, and shuffle them."""
    windows: list[Window] = []
    for trace in traces:
        count = len(trace.steps)
        offset = rng.randrange(config.window) if count > config.window else 0
        starts = [0, *range(offset, count, config.window)] if offset else list(range(0, count, config.window))
        windows += [(trace, a, b) for a, b in zip(starts, [*starts[1:], count], strict=True) if a < b]
    rng.shuffle(windows)
    return windows


def _loss(
    network: StepNetwork,
    windows: Sequence[Window],
    drawn: Sequence[tuple[str, float]],
    cue_weight: float,
    rng: random.Random,
) -> Tensor:
    """`drawn`: further requests and their risks."""
    texts: list[str] = []
    here: list[int] = []
    before: list[int] = []
    owner: list[int] = []
    for number, (trace, start, stop) in enumerate(windows):
        for index in range(max(0, start - 1), stop):
            texts.append(disguise_source(trace, trace.steps[index], rng))
            if index >= start:
                here.append(len(texts) - 1)
                before.append(len(texts) - 2 if index else -1)
                owner.append(number)
    vectors = network.embed(texts)
    asked = network.embed([trace.request for trace, _, _ in windows] + [request for request, _ in drawn])
    previous = torch.cat([vectors, torch.zeros_like(vectors[:1])])[before]
    logits = network.heads.step_logits(vectors[here], previous, asked[owner])
    risky = [RISKY[trace.kind] for trace, _, _ in windows] + [risk for _, risk in drawn]
    risk = functional.binary_cross_entropy_with_logits(network.heads.request_logits(asked), torch.tensor(risky))
    peaks = peak_loss(logits, torch.tensor(owner), windows)
    return step_loss(logits, windows, cue_weight) + RISK_SHARE * risk + PEAK_SHARE * peaks


def peak_loss(logits: Tensor, owner: Tensor, windows: Sequence[Window]) -> Tensor:
    """Cross entropy of each window's peak: whether it holds a cue at all.

    A threshold meets the highest score of a whole trace, so one step of a harmless trace that scores high costs as much
    as twenty. `logits` [n, 3] of all steps, `owner` [n] the number of each step's window. The peak is a soft maximum
    of the cue's log-odds over the labelled steps; windows without any count for nothing.
    """
    known = torch.tensor([i not in trace.unlabelled for trace, start, stop in windows for i in range(start, stop)])
    odds = logits[:, 0] - logits[:, 1:].logsumexp(1)
    rows = torch.full((len(windows), len(odds)), float("-inf"))
    rows[owner[known], known.nonzero().squeeze(1)] = _SHARP * odds[known]
    labels = [
        {trace.labels[i] for i in range(start, stop) if i not in trace.unlabelled} for trace, start, stop in windows
    ]
    weights = torch.tensor(
        [
            (_DELIBERATING if trace.kind == "harmful" and "cue" not in found else 1.0) if found else 0.0
            for (trace, _, _), found in zip(windows, labels, strict=True)
        ]
    )
    some = weights > 0
    if not some.any():
        return logits.sum() * 0.0
    holds = torch.tensor([float("cue" in found) for found in labels])
    peaks = rows[some].logsumexp(1) / _SHARP - _HIGH
    each = functional.binary_cross_entropy_with_logits(peaks, holds[some], reduction="none")
    return (each * weights[some]).mean()


def step_loss(logits: Tensor, windows: Sequence[Window], cue_weight: float = 1.0) -> Tensor:
    """Cross entropy of logits [n, 3] of all steps of the windows, weighed by `step_weights`."""
    labels = [LABELS.index(label) for trace, start, stop in windows for label in trace.labels[start:stop]]
    weights = torch.tensor([w for trace, start, stop in windows for w in step_weights(trace, cue_weight)[start:stop]])
    each = functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    return (each * weights).sum() / weights.sum().clamp(min=1e-6)


def step_weights(trace: LabelledTrace, cue_weight: float = 1.0) -> list[float]:
    """What each step of a trace weighs in the loss: unlabelled ones nothing, doubtful ones less, cues `cue_weight`."""
    return [
        (0.0 if index in trace.unlabelled else UNSURE_WEIGHT if index in trace.unsure else 1.0)
        * (cue_weight if label == "cue" else 1.0)
        for index, label in enumerate(trace.labels)
    ]


def disguise_source(trace: LabelledTrace, step: str, rng: random.Random) -> str:
    """A step in which the word that gives its source away is another one, most of the time."""
    if trace.source not in POLICY_SOURCES:
        return step
    return _POLICY.sub(lambda found: rng.choice((*_INSTEAD, found.group())), step)
