"""What each part is worth: the heads trained again without it on the same encoder's vectors, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np

from classifiers.build import BuildConfig, Material, encode_kept
from classifiers.corpus import Corpus
from classifiers.head_fit import HeadConfig, calibrate, fit_heads, score_traces
from classifiers.measure import choose_threshold, figures
from classifiers.stats import Rate
from classifiers.vectors import EncodedTrace

Change = Callable[[EncodedTrace], EncodedTrace]
KEPT = (
    "recall_complying_traces", "flagged_benign_traces", "flagged_alarming_traces", "flagged_deliberating_traces",
    "auroc_cue_vs_benign", "auroc_cue_vs_alarming", "auroc_cue_vs_deliberation",
)  # fmt: skip


def ablations(source: Path, corpus: Corpus, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, Rate]]:
    """Return the test figures of each variant; the encoder is the artifact's and saw all of its training data."""
    material = encode_kept(source, corpus, say)
    variants: dict[str, tuple[Change, Callable[[EncodedTrace], bool]]] = {
        "everything": (_same, _all),
        "without the request": (_without_request, _all),
        "without the step before": (_without_previous, _all),
        "without authored traces": (_same, lambda each: each.trace.source != "authored"),
        "without public traces": (_same, lambda each: each.trace.source in {"authored", "demo", "own"}),
        "labels: a half": (_same, lambda each: _share(each) < 0.5),
        "labels: a quarter": (_same, lambda each: _share(each) < 0.25),
    }
    found = {}
    for name, (change, keep) in variants.items():
        say(name)
        found[name] = _run(material, change, keep, seed)
    return found


def _run(material: Material, change: Change, keep: Callable[[EncodedTrace], bool], seed: int) -> dict[str, Rate]:
    config = BuildConfig(seed=seed)
    train = _changed((each for each in material.of("train") if keep(each)), change)
    validation, test = _changed(material.of("val"), change), _changed(material.of("test"), change)
    heads = calibrate(fit_heads(train, validation, material.risk, HeadConfig(seed=seed)), validation, material.risk)
    threshold = choose_threshold(score_traces(heads, validation), config.allowed)
    measured = figures(score_traces(heads, test), threshold)
    return {name: measured[name] for name in KEPT if name in measured}


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
