"""The curve: reasoning harm against benign refusals over what training can be set to, and the recipe chosen on it.

Every point is an adapter, trained on the pairs of a run and measured without a guard; with several seeds one in each
seed's run (RUN is OUT/seed-N, with one seed OUT), since what chance does to one training is as large as what a setting
does. Of a recipe of several stages the points change the last; they go on from the one before, which is trained once.
The requests are none that a report is about: a recipe chosen on the report's own requests would make the report look
better than its model is.

RUN/stage-N/                    the stages before the last (align.recipe)
RUN/curve/points/NAME/adapter/  one stage of training (align.stage)
RUN/curve/replies-DIGEST/       the replies of every point to one set of requests
OUT/curve/curve.json            figures; curve.md and curve.png show them
OUT/curve/chosen.yaml           the chosen point, as a recipe for --stages
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from align.curve_choice import CurveReport, PointReport, changes_of, choose, near
from align.curve_points import CurveSettings, Point, labels
from align.evaluate import Arm, EvalRequest, Outcome, run_arms, summarise
from align.generate import read_results
from align.pairs import Pair, read_pairs, request_key
from align.pipeline import AlignSettings, Workbench
from align.recipe import given_pairs, run_first_stages
from align.study import marked
from align.train import TrainReport, TrainSettings, merge, mix, train
from guard.errors import UserError


@dataclass(frozen=True)
class Measured:
    """What one seed's run showed: outcomes of the base model and, by name, of every point; what was trained."""

    seed: int
    outcomes: dict[str, list[Outcome]]
    training: dict[str, TrainReport]


def run_curve(
    runs: Sequence[tuple[AlignSettings, Path]],
    requests_of: Callable[[Workbench], list[EvalRequest]],
    source: str,
    settings: CurveSettings,
    accelerate: Path | None = None,
) -> CurveReport:
    """Trains and measures the points that are not on disk yet, once on the pairs of every run; the figures pool them.

    `runs`: of each seed its settings and directory. `source` tells where the requests come from; `accelerate`: see
    `align.train.train`. UserError for runs that do not differ in their seed alone, and for requests that may not be
    chosen on, before anything is trained.
    """
    first = runs[0][0]
    check_alike(runs)
    points = settings.points(first.recipe[-1])
    pairs = [read_pairs(out / "pairs.jsonl") for _, out in runs]
    found: list[Measured] = []
    for (run, out), given in zip(runs, pairs, strict=True):
        with Workbench.open(run, out) as bench:
            if not found:
                requests, judge = requests_of(bench), bench.judge.version
                for (_, other), known in zip(runs, pairs, strict=True):
                    check_requests(requests, known, other)
            found.append(_measured(bench, points, given, requests, accelerate))
    outcomes = {name: [o for run in found for o in marked(run.seed, run.outcomes[name])] for name in found[0].outcomes}
    reports = _reports(outcomes, labels(points), found)
    chosen = choose(reports, settings)
    return CurveReport(
        model=first.model, judge=judge, seeds=[run.seed for run in found], requests=source,
        counts=Counter(r.label for r in requests), topics=len({r.topic for r in requests}), settings=settings,
        before=first.recipe[:-1], base=summarise(outcomes["base"]), points=reports, chosen=chosen,
        near=near(chosen, reports, outcomes, settings),
        command=" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    )  # fmt: skip


def _reports(
    outcomes: Mapping[str, Sequence[Outcome]], shown: Mapping[str, str], found: Sequence[Measured]
) -> dict[str, PointReport]:
    return {
        name: PointReport(
            label=label, arm=summarise(outcomes[name]), changes=changes_of(outcomes["base"], outcomes[name]),
            training=[run.training[name] for run in found],
        )
        for name, label in shown.items()
    }  # fmt: skip


def _measured(
    bench: Workbench, points: Sequence[Point], pairs: Sequence[Pair], requests: Sequence[EvalRequest],
    accelerate: Path | None,
) -> Measured:  # fmt: skip
    _tell(f"the run in {bench.out}")
    training = train_points(bench, points, pairs, accelerate)
    return Measured(bench.settings.seed, _measure_all(bench, labels(points), requests), training)


def check_alike(runs: Sequence[tuple[AlignSettings, Path]]) -> None:
    """UserError for runs that do not differ in their seed alone: a mean over them would be of nothing."""
    (first, begun), *others = runs
    wanted, fix = "runs that differ in their seed alone", "Make them with one `align reproduce --seeds`"
    for settings, out in others:
        differing = [key for key in type(first).model_fields if getattr(settings, key) != getattr(first, key)]
        if keys := [key for key in differing if key != "seed"]:
            raise UserError(
                f"The runs in {begun} and {out} were begun with different settings",
                got=", ".join(keys), wanted=wanted, fix=fix,
            )  # fmt: skip
    seeds = [settings.seed for settings, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError("Two runs have the same seed", got=", ".join(map(str, seeds)), wanted=wanted, fix=fix)


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


def _tell(what: str) -> None:
    Console(stderr=True).print(f"curve: {what}", highlight=False)
