"""Commands around the detector: eval, compare, ablate, label, data; those that make one are in `train_cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from classifiers.console import print_differences, print_rates, progress
from classifiers.train_cli import WORSE, Own, Texts, export, tell, train
from guard.errors import UserError

Model = Annotated[Path | None, typer.Option(help="Artifact directory; by default the one in the package.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the classifiers' command group."""
    for command in (train, export, ablate, label):
        app.command()(command)
    app.command("eval")(evaluate)
    app.command("compare")(compare_two)
    app.command("data")(data)


def compare_two(
    first: Annotated[Path, typer.Argument(help="Artifact directory.")],
    second: Annotated[Path, typer.Argument(help="Artifact directory.")],
    own: Own = None,
    texts: Texts = None,
) -> None:
    """Compare two detectors on the same traces: a paired bootstrap, each at its own threshold.

    Exit code 3 when the second is worse than the first in any figure, as `train` has it.
    Example: cli.py classifier compare classifiers/default runs/detector
    """
    from classifiers.corpus import read_corpus
    from classifiers.gate import compare_paths

    corpus = read_corpus(texts, None, own or ())
    tell(corpus)
    (differences,) = compare_paths([first], second, corpus)
    print_differences(first, second, differences)
    if any(each.worse for each in differences):
        raise typer.Exit(WORSE)


def evaluate(
    out: Annotated[Path, typer.Option(help="Directory for eval.json and the plots.")],
    model: Model = None,
    own: Own = None,
    texts: Texts = None,
) -> None:
    """Measure a detector on the frozen test part: figures, slices, tiers, attacks, and plots.

    Public traces are measured from the vectors in the artifact, or from their texts where --texts gives them.
    Example: cli.py classifier eval --out runs/eval
    """
    from classifiers.build import score_encoded
    from classifiers.corpus import read_corpus
    from classifiers.detector import DEFAULT, Detector
    from classifiers.evaluate import evaluate as run
    from classifiers.evaluate import frozen_part
    from classifiers.plots import draw

    detector, corpus = Detector.load(model), read_corpus(texts, None, own or ())
    tell(corpus)
    traces = frozen_part(model or DEFAULT, detector, corpus)
    if not traces:
        raise UserError("there is nothing to measure on", wanted="traces of the test part")
    with progress("Measuring the detector") as (say, _):
        found = run(detector, traces, " ".join(["cli.py", *sys.argv[1:]]), say)
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        say("drawing")
        draw(score_encoded(detector, traces), detector.threshold, out)
    print_rates(
        f"{found.detector}, {found.traces} traces of the test part, threshold {found.threshold:g}", found.overall
    )
    for name, part in found.slices.items():
        print_rates(name, part)
    print_rates("tiers, traces with text", found.tiers)
    for name, part in found.attacks.items():
        print_rates(f"attack: {name}", part)
    Console().print(f"Written to {out}", highlight=False)


def ablate(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    model: Model = None,
    texts: Texts = None,
    seed: Annotated[int, typer.Option(help="Of the heads.")] = 0,
) -> None:
    """Train the heads again without one thing at a time, on the same encoder, and measure the test part.

    Example: cli.py classifier ablate --out runs/ablations.json
    """
    import json

    from classifiers.ablate import ablations
    from classifiers.corpus import read_corpus
    from classifiers.detector import DEFAULT

    with progress("Ablations") as (say, _):
        found = ablations(model or DEFAULT, read_corpus(texts), seed, say)
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: {key: rate.model_dump() for key, rate in part.items()} for name, part in found.items()}
    out.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    for name, part in found.items():
        print_rates(name, part)


def label(
    out: Annotated[Path, typer.Option(help="JSONL that your labels are appended to; give it to `train --data`.")],
    traces: Annotated[Path | None, typer.Option(help="Directory that `serve` writes traces to.")] = None,
    input: Annotated[
        Path | None, typer.Option(help='Or a JSONL of reasonings: {"id", "request", "reasoning"}.')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer decodes the traces; by default theirs.")
    ] = None,
    detector: Annotated[Path | None, typer.Option(help="Detector whose doubts come first.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many traces to ask about.")] = 20,
) -> None:
    """Label the traces that the detector doubts most, in the terminal (active learning).

    Example: cli.py classifier label --traces runs/traces --out reviewed.jsonl
    """
    from classifiers.review import from_rows, from_spool, review

    if (traces is None) == (input is None):
        raise UserError("there is nothing to label", wanted="either --traces or --input")
    rows = from_spool(traces, model) if traces else from_rows(input) if input else []
    review(rows, out, detector, limit, Console())


def data(
    out: Annotated[Path | None, typer.Option(help="Directory to assemble the public sets in, from the hub.")] = None,
) -> None:
    """List the public sources that the shipped detector learned from; with --out assemble those that the hub has.

    Example: cli.py classifier data --out runs/data
    """
    from classifiers.sources import SOURCES, assemble

    table = Table(title="Public sources")
    for column in ("source", "what", "licence", "where", "used for"):
        table.add_column(column)
    for source in SOURCES:
        table.add_row(source.name, source.what, source.licence, source.where, source.use)
    Console().print(table)
    if out:
        with progress("Assembling") as (say, _):
            lines = assemble(out, say)
        for line in lines:
            Console().print(line, highlight=False)
