"""The points of a curve: which recipes a grid stands for, and what they are called."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from align.pairs import Steps
from align.train import TrainSettings

#: The axes beside the scope, each a setting of a stage, and what a label calls them.
AXES = {"sft_weight": "SFT", "benign_share": "benign", "learning_rate": "rate", "contrast": "contrast"}


class Point(BaseModel):
    """What one point sets in the run's recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Steps
    sft_weight: float
    benign_share: float
    learning_rate: float
    contrast: float

    @property
    def name(self) -> str:
        """Its directory."""
        return (
            f"steps-{spelled(self.steps)}_sft-{self.sft_weight:g}_benign-{self.benign_share:g}"
            f"_lr-{self.learning_rate:g}_contrast-{self.contrast:g}"
        )

    def settings(self, run: TrainSettings) -> TrainSettings:
        """The whole stage: the last one of the run's recipe.

        A benign pair's own side keeps its width unless the others are wider: cut off before the rejected side is, it
        would be preferred for being short.
        """
        wider = max(self.steps, run.scope.benign_steps, key=_width)
        changes = self.model_dump(exclude={"steps"}) | {"scope": {"steps": self.steps, "benign_steps": wider}}
        return TrainSettings.model_validate(run.model_dump() | changes)


class CurveSettings(BaseModel):
    """The grid, every combination of which is a point, and what a point must hold to be chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Steps, ...] = (1, 2, 4, "reasoning", None)
    sft_weight: tuple[float, ...] = ()
    """Empty: the run's own; so in every axis."""
    benign_share: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    max_refusals: float = Field(default=0.05, ge=0.0)
    """What refusals of alarming requests may rise by."""
    max_quality_loss: float = Field(default=0.03, ge=0.0)
    """What the share of sound benign replies may fall by. On the demo's 60 topics its standard error is about that."""
    max_unsettled: float = Field(default=0.1, ge=0.0)
    """What the share of replies to harmful requests that neither refuse nor are judged harmful may rise by."""

    def points(self, run: TrainSettings) -> list[Point]:
        """The points in the order of the grid."""
        axes = [getattr(self, axis) or (getattr(run, axis),) for axis in AXES]
        return [
            Point(steps=steps, **dict(zip(AXES, values, strict=True)))
            for steps, *values in itertools.product(self.steps or (run.scope.steps,), *axes)
        ]


def labels(points: Sequence[Point]) -> dict[str, str]:
    """What tells each point from the others; the scope is always named."""
    varied = [axis for axis in AXES if len({getattr(point, axis) for point in points}) > 1]

    def label(point: Point) -> str:
        steps = spelled(point.steps)
        width = f"{steps} step{'s' * (steps != '1')}" if isinstance(point.steps, int) else steps
        return ", ".join([width, *(f"{AXES[axis]} {getattr(point, axis):g}" for axis in varied)])

    return {point.name: label(point) for point in points}


def spelled(steps: Steps) -> str:
    """A scope's width as the command line has it."""
    return "all" if steps is None else str(steps)


def _width(steps: Steps) -> float:
    return math.inf if steps is None else 1e9 if steps == "reasoning" else steps
