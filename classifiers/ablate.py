"""What each part is worth: the heads trained again without it on the same encoder's vectors, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from zlib import crc32

import numpy as np
from pydantic import BaseModel, ConfigDict

from classifiers.build import BuildConfig, Material
from classifiers.held_out import held_out
from classifiers.stats import Rate
from classifiers.trained import Trained, train_heads
from classifiers.vectors import EncodedTrace

Change = Callable[[EncodedTrace], EncodedTrace]
Say = Callable[[str], None]


class Ablations(BaseModel):
    """What `classifier ablate` writes."""

    model_config = ConfigDict(extra="forbid")

    encoder: str
    """The detector whose encoder the heads read."""
    seed: int
    heads: dict[str, dict[str, Rate]]
    """The test part under heads that did without something."""
    unseen: dict[str, dict[str, Rate]]
    """A family or a language under heads that never saw it."""
    kept: dict[str, str]
    """The families and languages that could not be left out, and why."""
    command: str


def ablate(material: Material, encoder: str, config: BuildConfig, command: str, say: Say) -> Ablations:
    """Train and measure every variant; the encoder saw all of its training data whatever the heads do without."""
    say("everything")
    everything = train_heads(material.of("train"), material.of("val"), material.risk, config)
    heads = variants(material, everything, config, say)
    unseen, kept = held_out(material, everything, config, say)
    return Ablations(encoder=encoder, seed=config.seed, heads=heads, unseen=unseen, kept=kept, command=command)


def variants(material: Material, everything: Trained, config: BuildConfig, say: Say) -> dict[str, dict[str, Rate]]:
    """The test figures of each variant, and of `everything`."""
    without: dict[str, tuple[Change, Callable[[EncodedTrace], bool]]] = {
        "without the request": (_without_request, _all),
        "without the step before": (_without_previous, _all),
        "without authored traces": (_same, lambda each: each.trace.source != "authored"),
        "without public traces": (_same, lambda each: each.trace.source in {"authored", "demo", "own"}),
        "labels: a half": (_same, lambda each: _share(each) < 0.5),
        "labels: a quarter": (_same, lambda each: _share(each) < 0.25),
    }
    found = {"everything": everything.figures(material.of("test"))}
    for name, (change, keep) in without.items():
        say(name)
        train = _changed((each for each in material.of("train") if keep(each)), change)
        trained = train_heads(train, _changed(material.of("val"), change), material.risk, config)
        found[name] = trained.figures(_changed(material.of("test"), change))
    return found


def _changed(traces: Iterable[EncodedTrace], change: Change) -> list[EncodedTrace]:
    return [change(each) for each in traces]


def _all(_: EncodedTrace) -> bool:
    return True


def _same(each: EncodedTrace) -> EncodedTrace:
    return each


def _without_request(each: EncodedTrace) -> EncodedTrace:
    return replace(each, request=np.zeros_like(each.request))


def _without_previous(each: EncodedTrace) -> EncodedTrace:
    return _Alone(each.trace, each.part, each.request, each.steps, each.ends)


class _Alone(EncodedTrace):
    """A trace whose steps know nothing of the step before."""

    @property
    def previous(self) -> np.ndarray:
        """Zeros [n, width]."""
        return np.zeros_like(self.steps)


def _share(each: EncodedTrace) -> float:
    """A number in [0, 1) that belongs to a trace."""
    return crc32(f"share/{each.trace.id}".encode()) / 2**32
