"""The curve: reasoning harm against benign refusals over what training can be set to, and the recipe chosen on it.

Every point is an adapter, trained on the pairs of one run and measured without a guard. Of a recipe of several stages
the points change the last; they go on from the one before, which is trained once. The requests are none that a report
is about: a recipe chosen on the report's own requests would make the report look better than its model is.

OUT/stage-N/                    the stages before the last (align.recipe)
OUT/curve/points/NAME/adapter/  one stage of training (align.stage)
OUT/curve/replies-DIGEST/       the replies of every point to one set of requests
OUT/curve/curve.json            figures; curve.md and curve.png show them
OUT/curve/chosen.yaml           the chosen point, as a recipe for --stages
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from align.curve_points import CurveSettings, Point, labels
from align.evaluate import Arm, ArmReport, EvalRequest, Label, Outcome, change, relative_drop, run_arms, summarise
from align.generate import read_results
from align.measure import sounder
from align.pairs import Pair, request_key
from align.recipe import given_pairs, run_first_stages
from align.train import TrainReport, TrainSettings, merge, mix, train
from classifiers.stats import Rate
from guard.errors import UserError

if TYPE_CHECKING:
    from align.pipeline import Workbench

EITHER = "harm in either place, relative drop"
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
    training: TrainReport


class CurveReport(BaseModel):
    """What `curve.json` holds."""

    model_config = ConfigDict(extra="forbid")

    model: str
    judge: str
    seed: int
    requests: str
    """Where they come from."""
    counts: dict[Label, int]
    """Requests by label."""
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


def run_curve(
    bench: Workbench,
    pairs: Sequence[Pair],
    requests: Sequence[EvalRequest],
    source: str,
    settings: CurveSettings,
    accelerate: Path | None = None,
) -> CurveReport:
    """Trains and measures the points that are not on disk yet. `source` tells where the requests come from;
    `accelerate`: see `align.train.train`. UserError for requests that may not be chosen on, before anything is trained.
    """
    check_requests(requests, pairs, bench.out)
    points = settings.points(bench.settings.recipe[-1])
    shown = labels(points)
    training = train_points(bench, points, pairs, accelerate)
    outcomes = _measure_all(bench, shown, requests)
    base = outcomes.pop("base")
    found = {
        name: PointReport(
            label=shown[name], arm=summarise(rows), changes=_changes(base, rows), training=training[name]
        )
        for name, rows in outcomes.items()
    }  # fmt: skip
    chosen = choose(found, settings)
    return CurveReport(
        model=bench.settings.model, judge=bench.judge.version, seed=bench.settings.seed, requests=source,
        counts=Counter(r.label for r in requests), topics=len({r.topic for r in requests}), settings=settings,
        before=bench.settings.recipe[:-1], base=summarise(base), points=found, chosen=chosen,
        near=_near(chosen, found, outcomes, settings),
        command=" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    )  # fmt: skip


def check_requests(requests: Sequence[EvalRequest], pairs: Sequence[Pair], out: Path) -> None:
    """UserError for requests that are trained on or reported on, and where a kind is missing."""
    counts = Counter(r.label for r in requests)
    if not counts["harmful"] or not counts["alarming"]:
        raise UserError(
            "A point is chosen by its harm and by what alarming requests it refuses",
            got=", ".join(f"{n} {label} requests" for label, n in counts.items()) or "no requests",
            wanted="harmful and alarming ones", fix="Add lines with the missing label to --requests",
        )  # fmt: skip
    asked = {request_key(r.request) for r in requests}
    if trained := asked & {request_key(p.request) for p in pairs}:
        raise UserError(
            f"{len(trained)} of the requests are trained on", got=min(trained),
            wanted=f"requests that are not in {out / 'pairs.jsonl'}", fix="Take them out of --requests",
        )  # fmt: skip
    if reported := asked & _reported(out):
        raise UserError(
            f"{len(reported)} of the requests belong to the report", got=min(reported),
            wanted="requests that no report is about", fix="Choose on others, or leave --requests out",
        )  # fmt: skip


def choose(points: Mapping[str, PointReport], settings: CurveSettings) -> str | None:
    """The point that harms least, in reasoning or answer, of those within the limits; None where there is none."""
    allowed = [name for name, point in points.items() if within(point, settings)]
    return min(allowed, key=lambda n: (points[n].arm.any_harm.rate, points[n].changes[ALARMING].rate), default=None)


def within(point: PointReport, settings: CurveSettings) -> bool:
    """Whether a point holds both limits, as measured (not by an end of its interval)."""
    refusals, sound = point.changes[ALARMING].rate, point.changes[SOUND].rate
    return refusals <= settings.max_refusals + ROUNDING and sound >= -settings.max_quality_loss - ROUNDING


def _reported(out: Path) -> set[str]:
    """Requests of reports, as far as they are known: the built-in set's, and those whose replies OUT's report shows."""
    from align.markdown import load_report
    from demo.topics import load_topics

    texts = [text for topic in load_topics("report") for text in (topic.request, topic.request2)]
    if (out / "report.json").exists():
        texts += [transcript.request for transcript in load_report(out / "report.json").transcripts]
    return set(map(request_key, texts))


def train_points(
    bench: Workbench, points: Sequence[Point], pairs: Sequence[Pair], accelerate: Path | None = None
) -> dict[str, TrainReport]:
    """Trains the points that are not on disk yet, and before them the run's stages but the last.

    All training comes before all measuring: one engine then measures every point. (Asked what the first stages'
    model refuses, an engine runs before; on a GPU it makes room.)"""
    run = bench.settings.recipe[-1]
    for point in points:
        _check_pairs(point.name, pairs, point.settings(run))
    start = run_first_stages(bench, pairs, accelerate)
    given = given_pairs(bench, pairs, run, start)
    bench.make_room()
    shown, found = labels(points), {}
    for number, point in enumerate(points, 1):
        adapter = _directory(bench, point.name) / "adapter"
        _tell(f"training point {number} of {len(points)}, {shown[point.name]}")
        found[point.name] = train(
            bench.settings.model, given, adapter, point.settings(run), bench.reader, bench.runtime.policy.limits,
            start=start, accelerate=accelerate,
        )  # fmt: skip
    return found


def _check_pairs(name: str, pairs: Sequence[Pair], settings: TrainSettings) -> None:
    if not mix(pairs, settings):
        counts = Counter(pair.kind for pair in pairs)
        raise UserError(
            f"Point {name} has nothing to train on",
            got=f"{counts['intervened']} intervened and {counts['benign']} benign pairs",
            wanted=f"a benign share of {settings.benign_share:g}", fix="Make more with `cli.py align pairs`",
        )  # fmt: skip


def _directory(bench: Workbench, name: str) -> Path:
    return bench.out / "curve" / "points" / name


def _measure_all(
    bench: Workbench, shown: Mapping[str, str], requests: Sequence[EvalRequest]
) -> dict[str, list[Outcome]]:
    """Replies of the base model and of every point. Other requests, or longer replies, have a directory each."""
    asked = "\n".join([str(bench.settings.max_tokens), *(r.model_dump_json() for r in requests)])
    replies = bench.out / "curve" / f"replies-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    _tell("measuring the base model")
    found = {"base": _measure(bench, "base", requests, replies)}
    for number, (name, label) in enumerate(shown.items(), 1):
        _tell(f"measuring point {number} of {len(shown)}, {label}")
        found[name] = _measure(bench, name, requests, replies)
    return found


def _measure(bench: Workbench, name: str, requests: Sequence[EvalRequest], replies: Path) -> list[Outcome]:
    """The merged weights stay only while they are needed; the adapter stays."""
    generator, merged = bench.generator("base"), _directory(bench, name) / "merged"
    if name != "base":
        if {f"{name}|{r.id}" for r in requests} - read_results(replies / f"{name}.jsonl").keys():
            merge(bench.settings.model, _directory(bench, name) / "adapter", merged)
        # Named even where nothing is missing, so that no other weights can ever answer in this one's name.
        generator.use(str(merged))
    outcomes = run_arms(
        [Arm(name, name)], requests, generator, bench.reader, bench.judge, replies,
        max_tokens=bench.settings.max_tokens,
    )[name]  # fmt: skip
    shutil.rmtree(merged, ignore_errors=True)
    return outcomes


def _changes(base: Sequence[Outcome], rows: Sequence[Outcome]) -> dict[str, Rate]:
    return {
        EITHER: relative_drop(base, rows, "any_harm"),
        "reasoning harm, relative drop": relative_drop(base, rows, "reasoning_harm"),
        "answer harm, relative drop": relative_drop(base, rows, "answer_harm"),
        ORDINARY: change(base, rows, "refusal", ["benign"]),
        ALARMING: change(base, rows, "refusal", ["alarming"]),
        SOUND: sounder(base, rows),
    }  # fmt: skip


def _near(
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


def _tell(what: str) -> None:
    Console(stderr=True).print(f"curve: {what}", highlight=False)
