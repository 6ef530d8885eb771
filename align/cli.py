"""`cli.py align`: from logged traces to safer weights. Run it weekly; every stage resumes from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.pairs_cli import export, pairs
from align.promote_cli import Gate, Versions, settle
from align.promote_cli import promote as promote_command
from align.promote_cli import rollback as rollback_command
from align.promote_cli import status as status_command

if TYPE_CHECKING:
    from align.evaluate import EvalRequest
    from align.pipeline import AlignSettings, Workbench

app = typer.Typer(
    help="Turn logged, intervened traces into preference pairs, train the model on them, measure the result.",
    invoke_without_command=True,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Option(help="Model directory or hub name; `demo` is the embedded demo reasoner.")]
Out = Annotated[Path, typer.Option(help="Directory of this run; an interrupted run on it goes on where it stopped.")]
Requests = Annotated[
    Path | None,
    typer.Option(
        help='Held-out requests, JSON lines {"request", "label": harmful|benign|alarming}; default: built in.'
    ),
]
Stages = Annotated[
    Path | None,
    typer.Option(help="YAML list of training stages, such as align/configs/paper.yaml; default: one stage."),
]
Accelerate = Annotated[
    Path | None, typer.Option(help="Train under `accelerate launch` with this file, such as align/configs/fsdp.yaml.")
]


@app.callback()
def align(
    context: typer.Context,
    traces: Annotated[Path | None, typer.Option(help="Directory that `serve` writes traces to.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or hub name; `demo` is the demo reasoner.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of this run.")] = None,
    requests: Requests = None,
    policy: Annotated[Path | None, typer.Option(help="Policy the guard runs under in the evaluation.")] = None,
    stages: Stages = None,
    accelerate: Accelerate = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, choice of pairs and training.")] = 0,
    promote: Annotated[
        bool, typer.Option("--promote", help="For cron: take new traces only, and promote what passes the gate.")
    ] = False,
    versions: Versions = Path("runs/versions"),
    gate: Gate = None,
    min_new: Annotated[int, typer.Option(min=1, help="With --promote: fewer new intervened traces are no run.")] = 20,
) -> None:
    """Runs collect, rollouts, judge, pairs, training and evaluation; with `--promote` the gate too.

    With `--promote` the exit code is 0 when a version was promoted or there was nothing to do, 3 when the gate refused.

    Examples:

    `cli.py align --traces traces/ --model ./my-model --out runs/align-week-48`

    `cli.py align --promote --traces traces/ --model ./my-model --out runs/align-$(date +%G-%V)`
    """
    if context.invoked_subcommand is not None:
        return
    given = {"--traces": traces, "--model": model, "--out": out}
    missing = [name for name, value in given.items() if value is None]
    if traces is None or model is None or out is None:
        raise typer.BadParameter(
            f"missing {', '.join(missing)} (or a subcommand: pairs, train, evaluate, promote, status, rollback, table)"
        )
    settings = _settings(model, policy, seed, stages)
    if promote:
        from align.gate import load_gate
        from align.promote import Weekly, weekly

        plan = Weekly(traces, versions, load_gate(gate), min_new, accelerate)
        outcome = weekly(settings, out, plan, lambda bench: _requests(bench, requests), typer.echo)
        return settle(outcome, versions, None) if outcome is not None else None
    from align import pipeline

    with pipeline.Workbench.open(settings, out) as bench:
        found = pipeline.make_pairs(bench, pipeline.collect(bench, traces))
        pipeline.train_and_measure(bench, found, _requests(bench, requests), accelerate)


app.command()(pairs)
app.command()(export)


@app.command(name="train")
def train_command(model: Model, out: Out, stages: Stages = None, accelerate: Accelerate = None, seed: int = 0) -> None:
    """Train a LoRA adapter on `OUT/pairs.jsonl` into `OUT/adapter`.

    Example: `cli.py align train --model demo --out runs/align`

    On many GPUs: `cli.py align train --model M --out runs/align --accelerate align/configs/fsdp.yaml`
    """
    from align import pipeline
    from align.pairs import read_pairs

    with pipeline.Workbench.open(_settings(model, None, seed, stages), out) as bench:
        report = pipeline.train_adapter(bench, read_pairs(out / "pairs.jsonl"), accelerate)
    typer.echo(f"trained on {report.pairs} pairs ({report.benign} benign) in {report.seconds:.0f} s: {out / 'adapter'}")


@app.command(name="evaluate")
def evaluate_command(model: Model, out: Out, requests: Requests = None, stages: Stages = None, seed: int = 0) -> None:
    """Measure base, base + guard, base + primer, aligned, aligned + guard; write `OUT/evaluation.json`.

    Example: `cli.py align evaluate --model demo --out runs/align --requests held-out.jsonl`
    """
    from align import pipeline

    with pipeline.Workbench.open(_settings(model, None, seed, stages), out) as bench:
        pipeline.measure(bench, _requests(bench, requests))


app.command(name="promote")(promote_command)
app.command(name="rollback")(rollback_command)
app.command(name="status")(status_command)


@app.command()
def table(
    report: Annotated[Path, typer.Option(help="The `report.json` of a run.")] = Path("runs/demo/report.json"),
) -> None:
    """Print a report's figures as Markdown tables, for a README or a ticket.

    Example: `cli.py align table --report runs/align/report.json`
    """
    from align.markdown import load_report, markdown

    typer.echo(markdown(load_report(report)), nl=False)


def _requests(bench: Workbench, path: Path | None) -> list[EvalRequest]:
    from align.requests import built_in, from_file

    return built_in(bench.prompt) if path is None else from_file(path, bench.prompt)


def _settings(model: str, policy: Path | None, seed: int, stages: Path | None = None) -> AlignSettings:
    from align.pipeline import AlignSettings
    from align.recipe import read_stages
    from align.train import TrainSettings

    if model == "demo":
        from demo.model import reasoner_model

        model = str(reasoner_model())
    recipe = [TrainSettings()] if stages is None else read_stages(stages)
    recipe = [stage.model_copy(update={"seed": seed}) for stage in recipe]
    return AlignSettings(model=model, policy=policy, seed=seed, stages=recipe)
