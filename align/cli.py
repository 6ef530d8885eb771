"""`cli.py align`: from logged traces to safer weights. Run it weekly; every stage resumes from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.curve_cli import curve
from align.pairs_cli import export, pairs
from align.promote_cli import Gate, Versions, settle
from align.promote_cli import promote as promote_command
from align.promote_cli import rollback as rollback_command
from align.promote_cli import status as status_command
from align.tasks import COUNT

if TYPE_CHECKING:
    from align.evaluate import EvalRequest
    from align.pipeline import Workbench
    from align.study import StudySettings

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
    typer.Option(
        help="YAML list of training stages. Default: the run's; if it is new, those of align/configs/default.yaml."
    ),
]
Accelerate = Annotated[
    Path | None, typer.Option(help="Train under `accelerate launch` with this file, such as align/configs/fsdp.yaml.")
]
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Such as 0,1,2: several seeds get a run each in OUT/seed-N. Default: the run's own; 0,1,2 for reproduce."
    ),
]
SecondJudge = Annotated[
    str | None,
    typer.Option("--judge", help="A second judge: openai:URL,MODEL (key in OPENAI_API_KEY), or a judge's directory."),
]
Baselines = Annotated[str, typer.Option(help="Trained baselines to measure too: sft, full-dpo, full-dpo-norm.")]
Tasks = Annotated[int, typer.Option(min=0, max=COUNT, help="Auto-checked reasoning tasks per arm; 0 leaves them out.")]
LmEval = Annotated[str, typer.Option(help="Tasks of lm-eval by name, such as gsm8k (needs lm-eval and the hub).")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens of a reply; reasoning models of the hub need thousands. Default: the run's, 160 if it is new.",
    ),
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
    max_tokens: MaxTokens = None,
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
            f"missing {', '.join(missing)} (or a subcommand: pairs, train, evaluate, curve, reproduce, promote, "
            "status, rollback, table)"
        )
    from align import pipeline

    settings = pipeline.AlignSettings.of(model, policy, seed, stages, max_tokens)
    if promote:
        from align.gate import load_gate
        from align.promote import Weekly, weekly

        plan = Weekly(traces, versions, load_gate(gate), min_new, accelerate)
        outcome = weekly(settings, out, plan, lambda bench: _requests(bench, requests), typer.echo)
        return settle(outcome, versions, None) if outcome is not None else None
    with pipeline.Workbench.open(settings, out) as bench:
        found = pipeline.make_pairs(bench, pipeline.collect(bench, traces))
        pipeline.train_and_measure(bench, found, _requests(bench, requests), accelerate)


app.command()(pairs)
app.command()(export)


@app.command(name="train")
def train_command(model: Model, out: Out, stages: Stages = None, accelerate: Accelerate = None) -> None:
    """Train a LoRA adapter on `OUT/pairs.jsonl` into `OUT/adapter`, with the run's policy and seed.

    Example: `cli.py align train --model demo --out runs/align`

    On many GPUs: `cli.py align train --model M --out runs/align --accelerate align/configs/fsdp.yaml`
    """
    from align import pipeline
    from align.pairs import read_pairs
    from align.study import recorded

    settings = pipeline.AlignSettings.of(model, None, 0, stages)
    if (out / pipeline.CARD).exists():
        run = recorded(out, settings.model)
        settings = run if stages is None else run.model_copy(update={"stages": settings.stages})
    with pipeline.Workbench.open(settings, out) as bench:
        report = pipeline.train_adapter(bench, read_pairs(out / "pairs.jsonl"), accelerate)
    typer.echo(f"trained on {report.pairs} pairs ({report.benign} benign) in {report.seconds:.0f} s: {out / 'adapter'}")


@app.command(name="evaluate")
def evaluate_command(
    model: Model,
    out: Out,
    requests: Requests = None,
    seeds: Seeds = None,
    judge: SecondJudge = None,
    baselines: Baselines = "",
    tasks: Tasks = COUNT,
    lm_eval: LmEval = "",
    max_tokens: MaxTokens = None,
) -> None:
    """Measure all arms of the run in OUT, each with intervals; write `OUT/report.html` and `report.json`.

    Example: `cli.py align evaluate --model demo --out runs/align --requests held-out.jsonl`

    Example: `cli.py align evaluate --model demo --out runs/align --judge openai:http://localhost:9000/v1,big-model`
    """
    from align import reproduce as study
    from align.pipeline import AlignSettings
    from align.study import recorded

    wanted = _study(seeds or "0", judge, baselines, tasks, lm_eval)
    settings = recorded(out, AlignSettings.of(model).model)
    if max_tokens is not None:
        settings = settings.model_copy(update={"max_tokens": max_tokens})
    if seeds is None:
        wanted = wanted.model_copy(update={"seeds": (settings.seed,)})
    study.evaluate(settings, out, wanted, lambda bench: _requests(bench, requests))


@app.command(name="reproduce")
def reproduce_command(
    model: Model,
    out: Out,
    requests: Requests = None,
    train_requests: Annotated[
        Path | None,
        typer.Option(help="Requests whose guarded replies are the traces; default: built in."),
    ] = None,
    traces: Annotated[Path | None, typer.Option(help="Traces that `serve` wrote, instead of --train-requests.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy the guard runs under.")] = None,
    stages: Stages = None,
    speed: Annotated[Path | None, typer.Option(help="What `benchmarks.align` wrote, for the report.")] = None,
    seeds: Seeds = None,
    judge: SecondJudge = None,
    baselines: Baselines = "sft,full-dpo,full-dpo-norm",
    tasks: Tasks = COUNT,
    lm_eval: LmEval = "",
    max_tokens: MaxTokens = None,
) -> None:
    """The paper's tables in shape, on any model: traces, pairs, training, all arms and baselines, every seed.

    The paper's numbers stand beside ours where the model is one of the paper's. Interrupted, it goes on where it was.

    Example: `cli.py align reproduce --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --out runs/paper --max-tokens 4096
    --requests benchmarks.jsonl --train-requests star-1.jsonl --judge openai:https://api.openai.com/v1,gpt-4o`
    """
    from align import reproduce as study
    from align.pipeline import AlignSettings
    from align.requests import from_file, training

    settings = AlignSettings.of(model, policy, 0, stages, max_tokens)
    wanted = _study(seeds or "0,1,2", judge, baselines, tasks, lm_eval)
    study.reproduce(
        settings, out, wanted, lambda bench: _requests(bench, requests),
        lambda bench: training(bench.prompt) if train_requests is None else from_file(train_requests, bench.prompt),
        traces, speed,
    )  # fmt: skip


app.command()(curve)
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


def _study(seeds: str, judge: str | None, baselines: str, tasks: int, lm_eval: str) -> StudySettings:
    from align.baselines import known_baselines
    from align.study import StudySettings, read_seeds
    from classifiers.judging import check_spec

    check_spec(judge)
    return StudySettings(
        seeds=read_seeds(seeds), judge=judge, baselines=known_baselines(baselines), tasks=tasks,
        lm_eval=tuple(name.strip() for name in lm_eval.split(",") if name.strip()),
    )  # fmt: skip
