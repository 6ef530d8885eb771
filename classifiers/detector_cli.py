"""Commands around the detector: eval, compare, ablate, label, data; those that make one are in `train_cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from classifiers.console import print_differences, print_evaluation, print_rates, progress
from classifiers.train_cli import WORSE, Own, Texts, export, tell, train
from guard.errors import UserError

Model = Annotated[Path | None, typer.Option(help="Artifact directory; by default the one in the package.")]


def command() -> str:
    """The command line as it was typed."""
    return " ".join(["cli.py", *sys.argv[1:]])


def register(app: typer.Typer) -> None:
    """Add the commands to the classifiers' command group."""
    for each in (train, export, ablate, label):
        app.command()(each)
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
    traces: Annotated[
        Path | None, typer.Option(help="Directory that `serve` wrote traces to: flagged shares of each zone.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With --traces: model whose tokenizer decodes them; by default theirs.")
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(help='Completions that people judged, for the answer zone: {"request", "response", "harmful"}.'),
    ] = None,
) -> None:
    """Measure a detector on the frozen test part: per request, per step, per zone, slices, tiers, attacks, and plots.

    Public traces are measured from the vectors in the artifact, or from their texts where --texts gives them.
    Example: cli.py classifier eval --out runs/eval
    """
    from classifiers.build import score_encoded
    from classifiers.corpus import read_corpus
    from classifiers.detector import DEFAULT, Detector
    from classifiers.evaluate import evaluate as run
    from classifiers.evaluate import frozen_part
    from classifiers.judge_data import read_responses
    from classifiers.plots import draw
    from classifiers.review import from_spool

    detector, corpus = Detector.load(model), read_corpus(texts, None, own or ())
    recorded = from_spool(traces, tokenizer) if traces else []
    judged = read_responses(responses) if responses else []
    tell(corpus)
    part = frozen_part(model or DEFAULT, detector, corpus)
    if not part:
        raise UserError("there is nothing to measure on", wanted="traces of the test part")
    with progress("Measuring the detector") as (say, _):
        found = run(detector, part, command(), say, recorded, judged)
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        say("drawing")
        draw(score_encoded(detector, part), detector.threshold, found.per_zone, out)
    print_evaluation(found)
    Console().print(f"Written to {out}", highlight=False)


def ablate(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    model: Model = None,
    texts: Texts = None,
    seed: Annotated[int, typer.Option(help="Of the heads.")] = 0,
) -> None:
    """Train the heads again without one thing at a time, on the same encoder, and measure the test part; then without
    one model family or language at a time, and measure that.

    Example: cli.py classifier ablate --out runs/ablations.json
    """
    from classifiers import ablate as ablations
    from classifiers.artifact import load_files
    from classifiers.build import BuildConfig, encode_kept
    from classifiers.corpus import read_corpus
    from classifiers.detector import DEFAULT
    from classifiers.head_fit import HeadConfig

    source, config = model or DEFAULT, BuildConfig(seed, heads=HeadConfig(seed))
    manifest, _ = load_files(source, "detector")
    with progress("Ablations") as (say, _):
        found = ablations.ablate(encode_kept(source, read_corpus(texts), say), manifest.version, config, command(), say)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for name, part in (found.heads | found.unseen).items():
        print_rates(name, part)
    for name, why in found.kept.items():
        Console().print(f"Not left out: {name} ({why})", highlight=False)


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

    table = Table("source", "what", "licence", "where", "version", "used for", title="Public sources")
    for source in SOURCES:
        table.add_row(source.name, source.what, source.licence, source.where, source.version, source.use)
    Console().print(table)
    if out:
        with progress("Assembling") as (say, _):
            lines = assemble(out, say)
        for line in lines:
            Console().print(line, highlight=False)
