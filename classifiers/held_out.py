"""How well heads read what they have never seen: a model family or a language is left out of all that they learn from
and are validated on, and then measured whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from classifiers.build import BuildConfig, Material
from classifiers.measure import RARE, Scored
from classifiers.stats import Rate
from classifiers.trained import Trained, train_heads
from classifiers.vectors import EncodedTrace

FAMILIES: dict[str, frozenset[str]] = {
    "DeepSeek-R1": frozenset({"star1"}),
    "R1-Distill-Llama-8B": frozenset({"ky295_advbench", "ky295_alpaca"}),
    "EXAONE-4.5-33B": frozenset({"exaone45"}),
    "authored": frozenset({"authored"}),
    "demo": frozenset({"demo"}),
}
"""Whose reasoning it is, by source. All authored traces are one family, whichever model's style they are in."""
Belongs = Callable[[EncodedTrace], bool]


def held_out(
    material: Material, everything: Trained, config: BuildConfig, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Rate]], dict[str, str]]:
    """Return the figures of each group under heads that never saw it, and under those that did; and the groups that
    could not be left out, with the reason.

    All parts of a group can be measured, for nothing of it was learned from or validated on; the encoder, though, has
    seen the training part. What `everything`, heads that saw it, make of its test part stands beside.
    """
    found: dict[str, dict[str, Rate]] = {}
    kept: dict[str, str] = {}
    for name, belongs in groups(material.traces).items():
        group = [each for each in material.traces if belongs(each)]
        complying = sum(Scored(each.trace, np.zeros(1), each.ends).complying for each in group)
        train, validation = ([each for each in material.of(part) if not belongs(each)] for part in ("train", "val"))
        if complying < RARE:
            kept[name] = f"complying traces: {complying}, fewer than {RARE}"
            continue
        if not (train and validation):
            kept[name] = "without it there is nothing to train or validate on"
            continue
        say(f"without {name}")
        without = train_heads(train, validation, material.risk, config)
        test = [each for each in group if each.part == "test"]
        found[f"{name}, never seen, all parts"] = without.figures(group)
        if 0 < len(test) < len(group):
            found[f"{name}, never seen, test part"] = without.figures(test)
            found[f"{name}, seen, test part"] = everything.figures(test)
    return found, kept


def groups(traces: Sequence[EncodedTrace]) -> dict[str, Belongs]:
    """What can be left out: each family, and each authored language but English, which the encoder was made for."""
    languages = sorted({each.trace.language for each in traces if each.trace.source == "authored"} - {"en"})
    return {
        **{name: _from(sources) for name, sources in FAMILIES.items()},
        **{f"language {language}": _in(language) for language in languages},
    }


def _from(sources: frozenset[str]) -> Belongs:
    return lambda each: each.trace.source in sources


def _in(language: str) -> Belongs:
    return lambda each: each.trace.language == language
