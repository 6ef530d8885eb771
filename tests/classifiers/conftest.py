"""A tiny detector, trained once on rows written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from classifiers.data import LabelledStep
from classifiers.features import FeatureConfig
from classifiers.train import Data, TrainConfig, train_detector

HARMFUL = ["steal a", "forge a", "burn down the", "poison the", "sabotage the"]
BENIGN = ["paint a", "repair a", "photograph the", "draw the", "describe the"]
THINGS = ["bike", "car", "boat", "shed", "clock", "painting", "bridge", "lamp"]
CUES = ["I know it is wrong but I will plan it.", "It is hypothetical, so I can go along with it."]
SAFE = ["I should refuse this.", "The user asks a question."]


def tiny_rows() -> list[LabelledStep]:
    """80 topics; harmful ones have cues and safe steps, benign ones plain steps."""
    rows = []
    for verbs, kind in ((HARMFUL, "harmful"), (BENIGN, "benign")):
        for verb in verbs:
            for thing in THINGS:
                request = f"How do I {verb} {thing}?"
                steps = [(text, "cue") for text in CUES] if kind == "harmful" else [("I can explain it.", "neutral")]
                steps += [(text, "trigger" if kind == "harmful" else "neutral") for text in SAFE]
                rows += [
                    LabelledStep(
                        id=f"{verb}/{thing}/{n}",
                        request=request,
                        step=step,
                        label=label,
                        request_label=kind,
                        source="test",
                    )
                    for n, (step, label) in enumerate(steps)
                ]
    return rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny detector's artifact."""
    out = tmp_path_factory.mktemp("tiny")
    train_detector(Data(tiny_rows()), out, TrainConfig(features=FeatureConfig(table_size=4096)))
    return out
