"""Commands of the classifiers: score, judge, judge-train, agreement, labels; the detector's are in `detector_cli`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from zlib import crc32

import typer
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from classifiers import detector_cli
from classifiers.data import REQUEST_EXAMPLE, read_requests, read_rows
from guard.errors import UserError

if TYPE_CHECKING:
    from classifiers.artifact import Manifest
    from classifiers.judge_data import LabelledResponse
    from classifiers.stats import Rate

app = typer.Typer(no_args_is_help=True, help="Train, run and check the detector and the judge.")
detector_cli.register(app)

HELD_OUT_RESPONSES = 0.3
TRAINED_ON = "jailjudge_mini"
"""The one source whose rows the shipped judge learned from; agreement with it is measured on the held-out share."""
SCORE_EXAMPLE = '{"id": "1", "request": "...", "reasoning": "..."}'
JUDGE_EXAMPLE = '{"id": "1", "request": "...", "reasoning": "", "answer": "..."}'

Out = Annotated[Path, typer.Option(help="Directory to write model.onnx and manifest.json to.")]
Seed = Annotated[int, typer.Option(help="Decides which topics are held out and how the authored rows are drawn.")]
Requests = Annotated[
    Path | None, typer.Option(help=f"JSONL of further requests for the risk of a request. A line: {REQUEST_EXAMPLE}")
]
Model = Annotated[Path | None, typer.Option(help="Artifact directory; by default the one in the package.")]


Line = TypeVar("Line", bound=BaseModel)


class JudgeRow(BaseModel):
    """One output to judge."""

    model_config = ConfigDict(extra="forbid")

    id: str
    request: str
    reasoning: str = ""
    answer: str


class JudgedLine(BaseModel):
    """What is written of one output."""

    id: str
    reasoning_harm: float
    answer_harm: float
    refusal: float


@app.command()
def score(
    input: Annotated[Path, typer.Option(help=f'JSONL; a line: {SCORE_EXAMPLE}, or "steps": [...] for "reasoning".')],
    output: Annotated[
        Path,
        typer.Option(help='JSONL to write: {"id", "steps": [{"text", "score", "unreadable", "cue"}], "first_cue"}.'),
    ],
    model: Model = None,
) -> None:
    """Score recorded reasoning as the live guard would under the default policy.

    Example: cli.py classifier score --input reasoning.jsonl --output scores.jsonl
    """
    from classifiers.detector import Detector
    from classifiers.offline import ScoreRow, score_rows

    detector = Detector.load(model)
    rows = read_rows(input, ScoreRow, SCORE_EXAMPLE)
    with _counted("Scoring", len(rows)) as tick:
        _write(output, (_ticked(line, tick) for line in score_rows(detector, rows)))


@app.command()
def judge(
    input: Annotated[Path, typer.Option(help=f"JSONL; a line: {JUDGE_EXAMPLE}")],
    output: Annotated[Path, typer.Option(help='JSONL to write: {"id", "reasoning_harm", "answer_harm", "refusal"}.')],
    model: Model = None,
) -> None:
    """Judge finished outputs: probabilities that the reasoning or the answer is harmful and that the answer declines.

    Example: cli.py classifier judge --input outputs.jsonl --output judged.jsonl
    """
    from classifiers.judge import Judge

    loaded = Judge.load(model)
    rows = read_rows(input, JudgeRow, JUDGE_EXAMPLE)
    with _counted("Judging", len(rows)) as tick:
        found = (loaded.judge([(row.request, row.reasoning, row.answer)])[0] for row in rows)
        lines = (JudgedLine(id=row.id, **verdict._asdict()) for row, verdict in zip(rows, found, strict=True))
        _write(output, (_ticked(line, tick) for line in lines))


@app.command("judge-train")
def judge_train(
    out: Out,
    extra: Annotated[
        Path | None, typer.Option(help='Human-labelled completions, JSONL: {"request", "response", "harmful"}.')
    ] = None,
    source: Annotated[list[str] | None, typer.Option(help="Use only extra rows of this source; repeatable.")] = None,
    requests: Requests = None,
    seed: Seed = 0,
) -> None:
    """Train a judge on the authored outputs and, if given, on human-labelled completions.

    Three in ten requests of the extra file are left for `agreement`.
    Example: cli.py classifier judge-train --extra labelled.jsonl --out runs/judge
    """
    from classifiers.judge_data import authored_outputs, from_demo, from_responses, read_responses
    from classifiers.judge_train import EXTRA_WEIGHT, JudgeConfig, train_judge
    from demo.rows import render_rows
    from demo.topics import load_topics

    rows = from_demo(render_rows("reasoner")) + authored_outputs(load_topics("reasoner"), seed)
    if extra:
        responses = [row for row in read_responses(extra, source or []) if not held_out(row)]
        rows += from_responses(responses, EXTRA_WEIGHT)
    with _steps("Training the judge") as say:
        manifest = train_judge(rows, out, JudgeConfig(seed=seed), say, read_requests(requests))
    _report(manifest, out)


@app.command()
def agreement(
    responses: Annotated[
        Path, typer.Option(help='Human-labelled completions, JSONL: {"request", "response", "harmful", "source"}.')
    ],
    model: Model = None,
) -> None:
    """Print how far the judge agrees with people, source by source.

    Example: cli.py classifier agreement --responses labelled.jsonl
    """
    from classifiers.agreement import agreement as agree
    from classifiers.judge import Judge
    from classifiers.judge_data import read_responses

    loaded, rows = Judge.load(model), read_responses(responses)
    table = Table(title=f"{loaded.version}: answer_harm at 0.5 against human labels [95 % interval]")
    groups = {name: [row for row in rows if row.source == name] for name in sorted({row.source for row in rows})}
    groups[TRAINED_ON] = [row for row in groups.get(TRAINED_ON, []) if held_out(row)]
    groups = {name: part for name, part in groups.items() if part}
    if not groups:
        raise UserError(f"{responses} holds no rows to measure on", wanted="human-labelled completions")
    with _counted("Judging", sum(map(len, groups.values()))) as tick:
        for name, part in groups.items():
            figures = agree(loaded, part, tick)
            if not table.columns:
                for column in ("source", "n", "harmful", *figures):
                    table.add_column(column.replace("_", " "))
            table.add_row(name, str(len(part)), str(sum(row.harmful for row in part)), *map(_cell, figures.values()))
    Console().print(table)


@app.command()
def labels(
    texts: Annotated[
        Path | None,
        typer.Option(
            help='Recorded reasonings to join, JSONL: {"id", "source", "request", "request_label", "reasoning"}.'
        ),
    ] = None,
) -> None:
    """Show the shipped step labels: how many of each kind, from where, and how far two labellers agree.

    The texts of public traces do not ship; with --texts the command says which labels find theirs.
    Example: cli.py classifier labels --texts traces.jsonl
    """
    from classifiers import labels as store

    rows, written = store.read_labels(), store.read_authored()
    table = Table(title="Labelled steps")
    for column in ("source", "traces", *store.LETTERS.values(), "unsure"):
        table.add_column(column)
    for source in sorted({row.source for row in rows}):
        mine = [row for row in rows if row.source == source]
        counts = [sum(row.labels.count(letter) for row in mine) for letter in store.LETTERS]
        table.add_row(source, str(len(mine)), *map(str, counts), str(sum(len(row.unsure) for row in mine)))
    for language in sorted({trace.language for trace in written}):
        traces = [trace for trace in written if trace.language == language]
        counts = [sum(trace.labels.count(label) for trace in traces) for label in store.LETTERS.values()]
        table.add_row(f"authored, {language}", str(len(traces)), *map(str, counts), "0")
    console = Console()
    console.print(table)
    for name, rate in store.agreement(rows).items():
        console.print(f"{name.replace('_', ' ')} of two labellers: {_cell(rate)}, n = {rate.n} steps", highlight=False)
    if texts:
        found, lost = store.join(rows, store.read_texts(texts))
        console.print(
            f"{len(found)} of {len(rows)} labelled traces found their text; {dict(lost) or 'none is missing'}"
        )


def held_out(row: LabelledResponse) -> bool:
    """Whether a labelled completion is kept from training, decided by its request's hash."""
    return crc32(row.request.encode()) / 2**32 < HELD_OUT_RESPONSES


def _cell(rate: Rate) -> str:
    return f"{rate.rate:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]"


def _report(manifest: Manifest, out: Path) -> None:
    table = Table(title=f"{manifest.version}, threshold {manifest.threshold:g}")
    for column in ("held-out figure", "rate [95 % interval]", "n"):
        table.add_column(column)
    for name, rate in manifest.metrics.items():
        table.add_row(name.replace("_", " "), _cell(rate), str(rate.n))
    Console().print(table)
    Console().print(f"Written to {out}", highlight=False)


def _write(path: Path, rows: Iterator[BaseModel]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json() + "\n")
    part.replace(path)


def _ticked(line: Line, tick: Callable[[], object]) -> Line:
    tick()
    return line


@contextmanager
def _counted(what: str, total: int) -> Iterator[Callable[[], object]]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _steps(what: str) -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda step: progress.update(task, description=f"{what}: {step}")
