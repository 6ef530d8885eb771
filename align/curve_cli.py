"""`cli.py align curve`: how much harm each recipe leaves and what it costs, and the one to train with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from align.curve_choice import CurveReport
    from align.curve_points import CurveSettings
    from align.evaluate import EvalRequest
    from align.pairs import Steps
    from align.pipeline import Workbench

T = TypeVar("T")
NONE_WITHIN = 3
"""Exit code where no point is within the limits."""


def _grid(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="The grid: every combination is a point")


def curve(
    model: Annotated[str, typer.Option(help="Model directory or hub name; `demo` is the embedded demo reasoner.")],
    out: Annotated[
        Path, typer.Option(help="Directory of a run with pairs, or of one a seed; an interrupted curve goes on.")
    ],
    requests: Annotated[
        Path | None,
        typer.Option(
            help='Requests to choose on, JSON lines {"request", "label": harmful|benign|alarming, "topic"}; none of '
            "them in the pairs or in the report. Default: the demo's `detector` topics."
        ),
    ] = None,
    steps: Annotated[
        str, _grid("Which tokens carry the preference: the first N steps, `reasoning`, or `all` (answer included).")
    ] = "1,2,4,reasoning,all",
    sft_weight: Annotated[
        str, _grid("Weight of the SFT term on chosen sides, such as 0.2,1; default: the run's.")
    ] = "",
    benign_share: Annotated[str, _grid("Share of benign pairs, such as 0.3,0.4; default: the run's.")] = "",
    learning_rate: Annotated[str, _grid("Learning rates, such as 5e-4,6.5e-4; default: the run's.")] = "",
    contrast: Annotated[
        str, _grid("Share of intervened pairs once more against a benign reply, such as 0,1; default: the run's.")
    ] = "",
    max_refusals: Annotated[
        float, typer.Option(min=0, help="Points that refusals of alarming requests may rise by.")
    ] = 5.0,
    max_quality_loss: Annotated[float, typer.Option(min=0, help="Points that sound benign replies may fall by.")] = 3.0,
    max_unsettled: Annotated[
        float,
        typer.Option(min=0, help="Points that replies to harmful requests that neither refuse nor harm may rise by."),
    ] = 10.0,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Such as 0,1,2: train and measure every point once in each run OUT/seed-N (`align reproduce` makes "
            "them) and choose on all together. Default: once, in OUT."
        ),
    ] = None,
    accelerate: Annotated[
        Path | None,
        typer.Option(help="Train under `accelerate launch` with this file, such as align/configs/fsdp.yaml."),
    ] = None,
) -> None:
    """Train one adapter per point of a grid on the pairs of OUT, measure harm against benign refusals, choose a recipe.

    Writes curve.json, curve.md and curve.png into OUT/curve, and the chosen point as OUT/curve/chosen.yaml for
    `--stages`: the least harm in reasoning or answer among the points within all limits. Exit code 3 when there is
    none. A point that is done is not done again, so a later grid may be larger. One training says little: of two with
    the same recipe one refused 5, the other 12 percent of sixty alarming requests (the demo model). Give several seeds.

    Example: `cli.py align curve --model demo --out runs/align`

    Example: `cli.py align curve --model demo --out runs/align --steps 1,reasoning --sft-weight 0.2,1
    --benign-share 0.3,0.4 --max-refusals 5`

    Example: `cli.py align curve --model demo --out runs/study --seeds 0,1,2 --steps 2 --benign-share 0.7,0.8`

    Then: `cli.py align --traces traces/ --model demo --out runs/next --stages runs/align/curve/chosen.yaml`
    """
    from rich.console import Console

    from align.curve_points import CurveSettings
    from align.curve_report import print_curve, write_curve
    from align.disk import full_disk_told

    settings = CurveSettings(
        **_axes(
            {"steps": steps, "sft_weight": sft_weight, "benign_share": benign_share, "learning_rate": learning_rate,
             "contrast": contrast}
        ),
        max_refusals=max_refusals / 100, max_quality_loss=max_quality_loss / 100, max_unsettled=max_unsettled / 100,
    )  # fmt: skip
    report = _measured(model, out, requests, settings, seeds, accelerate)
    with full_disk_told(out):
        write_curve(report, out / "curve")
    print_curve(report, Console())
    if report.chosen is None:
        raise typer.Exit(NONE_WITHIN)
    typer.echo(f"recipe for --stages: {out / 'curve' / 'chosen.yaml'}; all points: {out / 'curve' / 'curve.md'}")


def _measured(
    model: str, out: Path, requests: Path | None, settings: CurveSettings, seeds: str | None, accelerate: Path | None
) -> CurveReport:
    from align.curve import run_curve
    from align.pipeline import AlignSettings
    from align.requests import built_in, from_file
    from align.study import directory, read_seeds, recorded

    numbers = () if seeds is None else read_seeds(seeds)
    places = [directory(out, seed, numbers) for seed in numbers] or [out]
    name = AlignSettings.of(model).model

    def asked(bench: Workbench) -> list[EvalRequest]:
        return built_in(bench.prompt, "detector") if requests is None else from_file(requests, bench.prompt)

    source = "the demo's `detector` topics" if requests is None else str(requests)
    return run_curve([(recorded(place, name), place) for place in places], asked, source, settings, accelerate)


def _axes(grid: dict[str, str]) -> dict[str, Any]:
    read: dict[str, tuple[Callable[[str], Any], str]] = {
        "steps": (_width, "whole numbers from 1 on, `reasoning`, `all`, such as 1,2,reasoning"),
        "sft_weight": (_number(0, 1000), "numbers from 0 on, such as 0.2,1"),
        "benign_share": (_number(0, 1), "shares from 0 to 1, such as 0.3,0.4"),
        "learning_rate": (_number(1e-9, 1), "rates, such as 5e-4,6.5e-4"),
        "contrast": (_number(0, 1), "shares from 0 to 1, such as 0,1"),
    }
    return {axis: _list(f"--{axis.replace('_', '-')}", text, *read[axis]) for axis, text in grid.items()}


def _list(option: str, text: str, read: Callable[[str], T], wanted: str) -> tuple[T, ...]:
    """The values of a comma-separated list, each once; UserError names the one that is wrong."""
    from guard.errors import UserError

    found: dict[T, None] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            found[read(part)] = None
        except ValueError:
            raise UserError(option, got=part, wanted=wanted) from None
    return tuple(found)


def _width(text: str) -> Steps:
    if text in ("all", "reasoning"):
        return None if text == "all" else "reasoning"
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _number(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        # NaN is in no range.
        if not least <= value <= most:
            raise ValueError(text)
        return value

    return read
