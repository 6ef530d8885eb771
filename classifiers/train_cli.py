"""Commands that make a detector: train and export. Neither replaces one by a worse."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from classifiers.console import print_differences, print_manifest, print_rates, progress
from classifiers.labels import AUTHORED_EXAMPLE, TRACE_EXAMPLE
from guard.errors import UserError
from guard.store.cli import MaybeStoreUrl, opened

if TYPE_CHECKING:
    from classifiers.artifact import Manifest
    from classifiers.build import BuildConfig
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
Fpr = Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of ordinary benign requests that may be flagged.")]
FprAlarming = Annotated[float, typer.Option(min=0.0, max=0.5, help="The same of benign requests that sound harmful.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the artifact even by a worse one.")]
OUT = "Artifact directory. One that is there is replaced only by one no worse."
WORSE = 3
"""Exit code of a run whose artifact was refused, and of a comparison that the second artifact lost."""


def train(
    out: Annotated[Path, typer.Option(help=OUT)],
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
    authored: Annotated[
        bool, typer.Option(help="Learn from the shipped authored traces too; they validate and measure in any case.")
    ] = True,
    epochs: Annotated[int, typer.Option(min=1, max=500, help="With --tune: passes over the data, at most.")] = 5,
    patience: Annotated[
        int, typer.Option(min=1, max=500, help="With --tune: stop when validation was below its best for so many.")
    ] = 2,
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
    force: Force = False,
) -> None:
    """Train a detector: shipped labels and vectors, authored traces, and your own reviewed traces: files (--data), or
    what reviewers said in the pages of `serve --reviewers` (--store).

    By default the encoder is kept and the heads are trained on vectors, which takes a minute or two. The new artifact
    is compared with the one in --out and the shipped one on the frozen test part; where it is worse than either, --out
    stays as it is, the new one is left beside it as DIR.refused, and the exit code is 3.

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
    tune_config = TuneConfig(seed=seed, epochs=epochs, patience=patience, cue_weight=cue_weight)
    config = BuildConfig(seed, fpr, fpr_alarming, tune_config, heads_config)
    if tune and texts is None:
        raise UserError(
            "--tune learns from texts", fix="Give --texts FILE (`classifier data` says which), or drop --tune"
        )
    corpus = read_corpus(texts, requests, own or (), authored=authored, reviewed=reviewed_rows(store, model))
    tell(corpus)
    candidate = _beside(out, "candidate")
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
        network, kept, ran, why = tune_network(corpus, base, config, tick)
        how = f"encoder fine-tuned for {ran} epochs of at most {config.tune.epochs}, epoch {kept} kept: {why}"
        Console(stderr=True).print(how, highlight=False)
        if checkpoint:
            save_checkpoint(network, checkpoint)
        told: dict[str, str | int | float] = {"how": how, "own": own, "epoch_kept": kept, "epochs_ran": ran}
        told["patience"] = config.tune.patience
        return finish(encode_with(network, corpus, say), out, config, say, told, network.heads)


def train_heads(corpus: Corpus, source: Path, out: Path, config: BuildConfig, own: int) -> Manifest:
    """Go on training the heads of the artifact `source`, its encoder kept, and write the artifact."""
    from classifiers.build import encode_kept, finish

    with progress("Training the detector") as (say, _):
        told: dict[str, str | int | float] = {"how": f"heads alone, encoder of {source.name}", "own": own}
        return finish(encode_kept(source, corpus, say), out, config, say, told)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Float weights that `train --tune --checkpoint` kept.")],
    out: Annotated[Path, typer.Option(help=OUT)],
    texts: Texts = None,
    requests: Requests = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the pretrained encoder.")] = None,
    seed: Annotated[int, typer.Option(help="Of the heads.")] = 0,
    fpr: Fpr = 0.01,
    fpr_alarming: FprAlarming = 0.05,
    force: Force = False,
) -> None:
    """Turn float weights into an int8 artifact, check that the runtime agrees, and show what int8 costs.

    Where --out holds a detector already, the new one must not be worse, as for `train`.

    Example: cli.py classifier export runs/net.safetensors --texts traces.jsonl --out runs/detector
    """
    from classifiers.build import BuildConfig, encode_with, finish, float_loss
    from classifiers.corpus import read_corpus
    from classifiers.gate import holds_detector
    from classifiers.head_fit import HeadConfig
    from classifiers.network import base_directory

    corpus = read_corpus(texts, requests)
    tell(corpus)
    replaces = holds_detector(out)
    target = _beside(out, "candidate") if replaces else out
    config = BuildConfig(seed, fpr, fpr_alarming, heads=HeadConfig(seed=seed))
    network = load_checkpoint(checkpoint, base_directory(base))
    with progress("Exporting the detector") as (say, _):
        material = encode_with(network, corpus, say)
        manifest = finish(
            material, target, config, say, {"how": f"exported from {checkpoint.name}", "own": 0}, network.heads
        )
        loss = float_loss(network, target, corpus, say)
    print_manifest(manifest)
    print_rates("int8 against float32, test part", loss)
    if replaces:
        settle(target, out, corpus, force=force)


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


def tell(corpus: Corpus) -> None:
    """Say how many labels found no text, or another one: a wrong --texts file must not pass unnoticed. And where the
    operator's own traces went: those that are measured on are not learned from."""
    console = Console(stderr=True)
    for what, count in corpus.missing.items():
        console.print(f"{count} labelled public traces left out: {what}", highlight=False)
    own = corpus.own
    if any(own.values()):
        said = f"{own['train']} are trained on, {own['val']} validated on, {own['test']} measured on"
        console.print(f"{sum(own.values())} own traces, parted by their requests: {said}", highlight=False)


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
    """Put the candidate into `out`, unless it is worse than what it is compared with: then exit with code 3."""
    from classifiers.export import install
    from classifiers.gate import compare_paths, rivals

    firsts, worse = rivals(out), list[str]()
    for first, differences in zip(firsts, compare_paths(firsts, candidate, corpus), strict=True):
        print_differences(first, candidate, differences)
        worse += [f"{each} (against {first})" for each in differences if each.worse]
    if worse and not force:
        refused = _beside(out, "refused")
        shutil.rmtree(refused, ignore_errors=True)
        candidate.replace(refused)
        Console(stderr=True).print(
            f"The new detector is worse on the frozen test part: {'; '.join(worse)}. {out} stays as it was, the new "
            f"one lies in {refused}. --force writes it all the same.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(WORSE)
    install(candidate, out)
    shutil.rmtree(candidate)
    Console().print(f"Written to {out}", highlight=False)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")
