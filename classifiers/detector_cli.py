"""Commands around the detector: train, eval, export, compare, ablate, label, data."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from classifiers.console import print_differences, print_manifest, print_rates, progress
from classifiers.labels import AUTHORED_EXAMPLE, TRACE_EXAMPLE
from guard.errors import UserError
from guard.store.cli import MaybeStoreUrl, opened

if TYPE_CHECKING:
    from classifiers.artifact import Manifest
    from classifiers.build import BuildConfig
    from classifiers.compare import Difference
    from classifiers.corpus import Corpus
    from classifiers.labels import LabelledTrace
    from classifiers.network import StepNetwork

Own = Annotated[
    list[Path] | None,
    typer.Option("--data", help=f"JSONL of your labelled traces, repeatable. A line: {AUTHORED_EXAMPLE}"),
]
Texts = Annotated[
    Path | None, typer.Option(help=f"JSONL with the texts of the public labelled traces. A line: {TRACE_EXAMPLE}")
]
Requests = Annotated[
    Path | None, typer.Option(help='JSONL of labelled requests: {"request", "label", "source", "licence"}.')
]
Model = Annotated[Path | None, typer.Option(help="Artifact directory; by default the one in the package.")]
Fpr = Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of ordinary benign requests that may be flagged.")]
FprAlarming = Annotated[float, typer.Option(min=0.0, max=0.5, help="The same of benign requests that sound harmful.")]
WORSE = 3
"""Exit code of a training run whose artifact was refused."""


def register(app: typer.Typer) -> None:
    """Add the commands to the classifiers' command group."""
    for command in (train, export, ablate, label):
        app.command()(command)
    app.command("eval")(evaluate)
    app.command("compare")(compare_two)
    app.command("data")(data)


def train(
    out: Annotated[Path, typer.Option(help="Artifact directory. One that is there is replaced only by one no worse.")],
    own: Own = None,
    store: MaybeStoreUrl = None,
    model: Annotated[
        str | None, typer.Option(help="With --store: model whose tokenizer decodes the traces; by default theirs.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Fine-tune the encoder too (half an hour on two cores; needs --texts)."),
    ] = False,
    base: Annotated[Path | None, typer.Option(help="With --tune: directory of the pretrained encoder.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="With --tune: where to keep the float weights.")] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Without --tune: artifact whose encoder is kept; by default the shipped one."),
    ] = None,
    texts: Texts = None,
    requests: Requests = None,
    authored: Annotated[bool, typer.Option(help="Learn from the shipped authored traces too.")] = True,
    epochs: Annotated[int, typer.Option(min=1, max=500, help="With --tune: passes over the data.")] = 5,
    head_epochs: Annotated[int, typer.Option(min=1, max=500, help="Without --tune: passes over the vectors.")] = 20,
    head_lr: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Without --tune: learning rate of the heads.")
    ] = 1e-4,
    cue_weight: Annotated[
        float, typer.Option(min=0.01, max=100.0, help="What a cue weighs in the loss, beside a step that is none.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides initial weights and the order of the data.")] = 0,
    fpr: Fpr = 0.01,
    fpr_alarming: FprAlarming = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact even by a worse one.")] = False,
) -> None:
    """Train a detector: shipped labels and vectors, authored traces, and your own reviewed traces: files (--data), or
    what reviewers said in the pages of `serve --reviewers` (--store).

    By default the encoder is kept and the heads are trained on vectors, which takes a minute or two. The new artifact
    is compared with the one in --out (or the shipped one) on the frozen test part; where it is worse, the old one
    stays, the new one is left beside it as DIR.refused, and the exit code is 3.

    Examples:

    cli.py classifier train --data reviewed.jsonl --out runs/detector

    cli.py classifier train --store sqlite:///runs/traces/store.db --out runs/detector
    """
    from classifiers.build import BuildConfig
    from classifiers.corpus import read_corpus
    from classifiers.detector import DEFAULT
    from classifiers.head_fit import HeadConfig
    from classifiers.network import base_directory
    from classifiers.tune import TuneConfig

    heads_config = HeadConfig(seed, head_epochs, lr=head_lr, cue_weight=cue_weight)
    tune_config = TuneConfig(seed=seed, epochs=epochs, cue_weight=cue_weight)
    config = BuildConfig(seed, fpr, fpr_alarming, tune_config, heads_config)
    if tune and texts is None:
        raise UserError(
            "--tune learns from texts", fix="Give --texts FILE (`classifier data` says which), or drop --tune"
        )
    corpus = read_corpus(texts, requests, own or (), authored=authored, reviewed=reviewed_rows(store, model))
    tell_missing(corpus)
    candidate = out.with_name(out.name + ".candidate")
    if tune:
        manifest = train_whole(
            corpus, base_directory(base), candidate, config, checkpoint, len(own or ()) + bool(store)
        )
    else:
        manifest = train_heads(corpus, start or DEFAULT, candidate, config, len(own or ()) + bool(store))
    print_manifest(manifest)
    settle(candidate, out, corpus, force=force)


def train_whole(
    corpus: Corpus, base: Path, out: Path, config: BuildConfig, checkpoint: Path | None, own: int
) -> Manifest:
    """Fine-tune encoder and heads together and write the artifact; `own`: files and stores of the operator's."""
    from classifiers.build import encode_with, finish, tune_network

    with progress("Training the detector") as (say, tick):
        network = tune_network(corpus, base, config, tick)
        if checkpoint:
            save_checkpoint(network, checkpoint)
        told: dict[str, str | int | float] = {"how": f"encoder fine-tuned for {config.tune.epochs} epochs", "own": own}
        return finish(encode_with(network, corpus, say), out, config, say, told, network.heads)


def train_heads(corpus: Corpus, source: Path, out: Path, config: BuildConfig, own: int) -> Manifest:
    """Go on training the heads of the artifact `source`, its encoder kept, and write the artifact."""
    from classifiers.build import encode_kept, finish

    with progress("Training the detector") as (say, _):
        told: dict[str, str | int | float] = {"how": f"heads alone, encoder of {source.name}", "own": own}
        return finish(encode_kept(source, corpus, say), out, config, say, told)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Float weights that `train --tune --checkpoint` kept.")],
    out: Annotated[Path, typer.Option(help="Artifact directory to write.")],
    texts: Texts = None,
    requests: Requests = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the pretrained encoder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the heads.")] = 0,
    fpr: Fpr = 0.01,
    fpr_alarming: FprAlarming = 0.05,
) -> None:
    """Turn float weights into an int8 artifact, check that the runtime agrees, and show what int8 costs.

    Example: cli.py classifier export runs/net.safetensors --texts traces.jsonl --out runs/detector
    """
    from classifiers.build import BuildConfig, encode_with, finish, float_loss
    from classifiers.corpus import read_corpus
    from classifiers.head_fit import HeadConfig
    from classifiers.network import base_directory

    corpus = read_corpus(texts, requests)
    tell_missing(corpus)
    config = BuildConfig(seed, fpr, fpr_alarming, heads=HeadConfig(seed=seed))
    network = load_checkpoint(checkpoint, base_directory(base))
    with progress("Exporting the detector") as (say, _):
        material = encode_with(network, corpus, say)
        manifest = finish(
            material, out, config, say, {"how": f"exported from {checkpoint.name}", "own": 0}, network.heads
        )
        loss = float_loss(network, out, corpus, say)
    print_manifest(manifest)
    print_rates("int8 against float32, test part", loss)


def reviewed_rows(url: str | None, model: str | None) -> list[LabelledTrace]:
    """The traces that were reviewed in a store's pages; says how many there are, and which were left out and why."""
    if url is None:
        return []
    from classifiers.reviewed import from_store

    with opened(url) as store:
        found, left_out = from_store(store, model)
    said = [f"{len(found)} reviewed traces", *(f"{count} left out: {why}" for why, count in left_out.items())]
    Console(stderr=True).print("; ".join(said), highlight=False)
    return found


def tell_missing(corpus: Corpus) -> None:
    """Say how many labels found no text, or another one: a wrong --texts file must not pass unnoticed."""
    for what, count in corpus.missing.items():
        Console(stderr=True).print(f"{count} labelled public traces left out: {what}", highlight=False)


def save_checkpoint(network: StepNetwork, path: Path) -> None:
    """Write a network's weights as safetensors."""
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(network, str(path))


def load_checkpoint(path: Path, base: Path) -> StepNetwork:
    """Read weights that `save_checkpoint` wrote; UserError when they are not such weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from classifiers.network import StepNetwork
    from classifiers.tune import TuneConfig

    network = StepNetwork(base, TuneConfig().frozen_layers)
    try:
        load_model(network, str(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} is no checkpoint", got=str(error)[:200], wanted="what `train --checkpoint` wrote"
        ) from None
    return network.eval()


def settle(candidate: Path, out: Path, corpus: Corpus, *, force: bool) -> None:
    """Put the candidate in place of the artifact it is compared with, unless it is worse: then exit with code 3."""
    from classifiers.detector import DEFAULT
    from classifiers.export import install

    rival = out if (out / "manifest.json").exists() else DEFAULT if (DEFAULT / "manifest.json").exists() else None
    worse = False
    if rival is not None:
        differences = compare_paths(rival, candidate, corpus)
        print_differences(rival, candidate, differences)
        worse = any(each.worse for each in differences)
    if worse and not force:
        refused = out.with_name(out.name + ".refused")
        shutil.rmtree(refused, ignore_errors=True)
        candidate.replace(refused)
        Console(stderr=True).print(
            f"The new detector is worse on the frozen test part: {rival} stays as it is, the new one lies in "
            f"{refused}. --force replaces it all the same.",
            highlight=False,
        )
        raise typer.Exit(WORSE)
    install(candidate, out)
    shutil.rmtree(candidate)
    Console().print(f"Written to {out}", highlight=False)


def compare_paths(first: Path, second: Path, corpus: Corpus) -> list[Difference]:
    """Compare two artifacts on the frozen test part."""
    from classifiers.build import score_encoded
    from classifiers.compare import compare
    from classifiers.detector import Detector
    from classifiers.evaluate import frozen_part

    sides = [(Detector.load(path), path) for path in (first, second)]
    parts = [frozen_part(path, detector, corpus) for detector, path in sides]
    shared = {each.trace.id for each in parts[0]} & {each.trace.id for each in parts[1]}
    scored = [
        score_encoded(detector, [each for each in part if each.trace.id in shared])
        for (detector, _), part in zip(sides, parts, strict=True)
    ]
    return compare(scored[0], scored[1], (sides[0][0].threshold, sides[1][0].threshold))


def compare_two(
    first: Annotated[Path, typer.Argument(help="Artifact directory.")],
    second: Annotated[Path, typer.Argument(help="Artifact directory.")],
    own: Own = None,
    texts: Texts = None,
) -> None:
    """Compare two detectors on the same traces: a paired bootstrap, each at its own threshold.

    Exit code 3 when the second is worse than the first in any figure.
    Example: cli.py classifier compare classifiers/default runs/detector
    """
    from classifiers.corpus import read_corpus

    differences = compare_paths(first, second, read_corpus(texts, None, own or ()))
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

    detector = Detector.load(model)
    traces = frozen_part(model or DEFAULT, detector, read_corpus(texts, None, own or ()))
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
