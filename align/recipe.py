"""A recipe is a list of training stages, each a directory that goes on from the one before; the last is `adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from align.claims import check, read_card
from align.pairs import Pair
from align.refusals import refusal_id, refusals
from align.stage import StageCard
from align.train import TrainReport, TrainSettings, merge, read_report, train
from guard.errors import UserError
from guard.settings import read_yaml

if TYPE_CHECKING:
    from align.pipeline import Workbench


#: What a run trains that names no other stages.
DEFAULT = Path(__file__).with_name("configs") / "default.yaml"


def read_stages(path: Path) -> list[TrainSettings]:
    """A YAML list of stage settings, such as `DEFAULT`; a UserError names the key that is wrong."""
    try:
        stages = TypeAdapter(list[TrainSettings]).validate_python(read_yaml(path, "Stages file"))
    except ValidationError as error:
        raise UserError(
            f"Stages file {path} is malformed", got=" ".join(str(error).split()), wanted="a list of stage settings"
        ) from error
    if not stages:
        raise UserError(f"Stages file {path} holds no stage")
    if stages[0].benign == "refusal":
        raise UserError(
            f"Stages file {path}: the first stage has no stage before it",
            got="benign: refusal", wanted="benign: trigger",
        )  # fmt: skip
    shapes = {(stage.method, stage.rank, stage.first_layer) for stage in stages}
    if len(shapes) > 1:
        raise UserError(
            f"Stages file {path}: stages go on from each other's weights",
            got=f"{len(shapes)} different shapes", wanted="one method, rank and first_layer",
        )  # fmt: skip
    return stages


def stage_directories(bench: Workbench) -> list[Path]:
    """Where the run's training stages lie; the last one is what is served."""
    return [bench.out / f"stage-{number}" for number in range(1, len(bench.settings.stages))] + [bench.out / "adapter"]


def run_stages(bench: Workbench, pairs: Sequence[Pair], accelerate: Path | None = None) -> TrainReport:
    """Trains the stages that are not there already; returns the last one's report. `accelerate`: see `align.train`.

    UserError, before anything is trained, where a directory holds another stage than the recipe has there.
    """
    stages, outs = bench.settings.recipe, stage_directories(bench)
    if not stages:
        raise UserError("No training stages", fix="Give at least one")
    for out, settings, start in zip(outs, stages, [None, *outs[:-1]], strict=True):
        _check(out, settings, start)
    start = run_first_stages(bench, pairs, accelerate)
    return _run(bench, pairs, outs[-1], stages[-1], start, accelerate)


def run_first_stages(bench: Workbench, pairs: Sequence[Pair], accelerate: Path | None = None) -> Path | None:
    """Trains all stages but the last that are not there already; returns what the last one goes on from, or None."""
    start = None
    for out, settings in zip(stage_directories(bench)[:-1], bench.settings.recipe[:-1], strict=True):
        _check(out, settings, start)
        _run(bench, pairs, out, settings, start, accelerate)
        start = out
    return start


def given_pairs(bench: Workbench, pairs: Sequence[Pair], settings: TrainSettings, start: Path | None) -> list[Pair]:
    """What a stage chooses its pairs from."""
    return _refused(bench, pairs, start) if settings.benign == "refusal" and start is not None else list(pairs)


def _run(
    bench: Workbench, pairs: Sequence[Pair], out: Path, settings: TrainSettings, start: Path | None,
    accelerate: Path | None,
) -> TrainReport:  # fmt: skip
    report = read_report(out)
    if report is None:
        given = given_pairs(bench, pairs, settings, start)
        bench.make_room()
        report = train(
            bench.settings.model, given, out, settings, bench.reader, bench.runtime.policy.limits,
            start=start, accelerate=accelerate,
        )  # fmt: skip
    return report


def _check(out: Path, settings: TrainSettings, start: Path | None) -> None:
    held = read_card(out / "stage.json", StageCard)
    if held is None:
        return
    got, wanted = (path.name if path else "the model as it came" for path in (start, held.start))
    if got != wanted:
        raise UserError(
            f"{out} holds another training stage: `start` differs", got=got, wanted=wanted, fix="Choose another --out"
        )
    check(held.settings, settings, f"{out} holds another training stage")


def _refused(bench: Workbench, pairs: Sequence[Pair], start: Path) -> list[Pair]:
    """The intervened pairs, and the benign ones against what the model in `start` refuses. Those that it answers stay
    as they are, to fill up: without them a first stage that refuses little where a reply has begun left 7 pairs to
    train on, and a model that refused 8 of 10 benign requests (demo, seed 2)."""
    generator = bench.generator("base")
    generator.use(str(merge(bench.settings.model, start, start / "merged")))
    found, counts = refusals(
        pairs, generator, bench.reader, bench.judge, start, max_tokens=bench.settings.max_tokens
    )  # fmt: skip
    Console(stderr=True).print(f"benign requests after {start.name}: {dict(counts)}")
    instead = {pair.id: pair for pair in found}
    benign = {p.id: instead.get(refusal_id(p), p.model_copy(update={"answered": True})) for p in pairs}
    return [benign[pair.id] if pair.kind == "benign" else pair for pair in pairs]
