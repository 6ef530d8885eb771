"""What a curve shows, and the choice: which of its points hold the limits, and the one of them that harms least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from align.curve_points import CurveSettings
from align.evaluate import (
    ArmReport,
    Label,
    Outcome,
    answers_harmlessly,
    change,
    change_of,
    is_sound,
    relative_drop,
)
from align.measure import BENIGN
from align.train import TrainReport, TrainSettings
from classifiers.stats import Rate

EITHER = "harm in either place, relative drop"
UNSETTLED = "neither refused nor harmful, points"
ORDINARY, ALARMING = "ordinary refusals, points", "alarming refusals, points"
SOUND = "sound benign replies, points"
ABOVE = "harm in either place above the chosen, points"
#: A limit of 5 points holds for 3 of 60, however the division is rounded.
ROUNDING = 1e-9


class PointReport(BaseModel):
    """One point of the curve."""

    model_config = ConfigDict(extra="forbid")

    label: str
    """What tells it from the others."""
    arm: ArmReport
    changes: dict[str, Rate]
    """Against the base model, and (`ABOVE`) against the chosen point; paired by request."""
    training: list[TrainReport]
    """Seed by seed."""


class CurveReport(BaseModel):
    """What `curve.json` holds."""

    model_config = ConfigDict(extra="forbid")

    model: str
    judge: str
    seeds: list[int]
    requests: str
    """Where they come from."""
    counts: dict[Label, int]
    """Requests by label; each is asked once a seed."""
    topics: int
    settings: CurveSettings
    before: list[TrainSettings] = []
    """The stages that all points go on from."""
    base: ArmReport
    points: dict[str, PointReport]
    chosen: str | None
    """A name; None: no point holds the limits."""
    near: list[str]
    """Points within the limits whose harm is not told apart from the chosen one's: the interval of `ABOVE` holds 0."""
    command: str


def choose(points: Mapping[str, PointReport], settings: CurveSettings) -> str | None:
    """The point that harms least, in reasoning or answer, of those within the limits; None where there is none."""
    allowed = [name for name, point in points.items() if within(point, settings)]
    return min(allowed, key=lambda n: (points[n].arm.any_harm.rate, points[n].changes[ALARMING].rate), default=None)


def within(point: PointReport, settings: CurveSettings) -> bool:
    """Whether a point holds all limits, as measured (not by an end of its interval)."""
    moved = {
        ALARMING: (1, settings.max_refusals), UNSETTLED: (1, settings.max_unsettled),
        SOUND: (-1, settings.max_quality_loss),
    }  # fmt: skip
    return all(sign * point.changes[name].rate <= most + ROUNDING for name, (sign, most) in moved.items())


def changes_of(base: Sequence[Outcome], rows: Sequence[Outcome]) -> dict[str, Rate]:
    """What a point changed against the base model."""
    return {
        EITHER: relative_drop(base, rows, "any_harm"),
        "reasoning harm, relative drop": relative_drop(base, rows, "reasoning_harm"),
        "answer harm, relative drop": relative_drop(base, rows, "answer_harm"),
        UNSETTLED: change_of(base, rows, answers_harmlessly, ["harmful"]),
        ORDINARY: change(base, rows, "refusal", ["benign"]),
        ALARMING: change(base, rows, "refusal", ["alarming"]),
        SOUND: change_of(base, rows, is_sound, BENIGN),
    }  # fmt: skip


def near(
    chosen: str | None, points: Mapping[str, PointReport], outcomes: Mapping[str, Sequence[Outcome]],
    settings: CurveSettings,
) -> list[str]:  # fmt: skip
    """Writes every point's distance from the chosen one into its changes; names those that are not told apart."""
    if chosen is None:
        return []
    others = {name: point for name, point in points.items() if name != chosen}
    for name, point in others.items():
        point.changes[ABOVE] = change(outcomes[chosen], outcomes[name], "any_harm", ["harmful"])
    return [name for name, point in others.items() if within(point, settings) and point.changes[ABOVE].lo <= 0]
