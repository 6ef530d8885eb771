"""Commands on what the guard wrote: `traces ls`, `traces show`, and those of `guard.store.cli`."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from guard.errors import UserError
from guard.store.cli import MaybeStoreUrl, export, ingest, opened, prune
from guard.traces import StepRecord, Trace, read_traces, summary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Read what the guard wrote.")

Decoder = Callable[[list[int]], str]


@app.command()
def ls(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="The directory that `serve` writes traces to.")
    ] = None,
    store: MaybeStoreUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
) -> None:
    """List guarded requests, the newest last: of a trace directory, or of a store.

    Examples:

    cli.py traces ls runs/traces --limit 20

    cli.py traces ls --store postgresql://guard@db/traces
    """
    shown, said = _newest(_where(directory, store), limit)
    if as_json:
        for trace in shown:
            typer.echo(json.dumps({"created": trace.created, **summary(trace)}))
    else:
        Console().print(_table(shown))
    typer.echo(said, err=True)


def _newest(where: Path | str, limit: int) -> tuple[list[Trace], str]:
    """The newest traces, and how reading them went."""
    if isinstance(where, Path):
        traces, report = read_traces(where)
        return sorted(traces, key=lambda t: t.created)[-limit:], (
            f"{report.traces} traces in {report.files} files; {report.malformed} malformed lines skipped, "
            f"{report.superseded} superseded."
        )
    with opened(where) as store:
        from guard.store import reading

        files, malformed = reading.damage(store)
        said = f"{reading.count(store)} traces from {files} files; {malformed} malformed lines skipped."
        return reading.newest(store, limit), said


def _find(where: Path | str, guard_id: str) -> Trace:
    if isinstance(where, Path):
        traces, _ = read_traces(where)
        trace = next((t for t in traces if t.guard_id == guard_id), None)
    else:
        with opened(where) as store:
            from guard.store import reading

            trace = reading.find(store, guard_id)
    if trace is None:
        place = where if isinstance(where, Path) else "the store"
        raise UserError(f"No trace {guard_id} in {place}", fix="`traces ls` lists what there is")
    return trace


def _where(directory: Path | None, store: str | None) -> Path | str:
    """The directory, or the store's URL."""
    if (directory is None) == (store is None):
        raise UserError("Say where the traces are", wanted="either a trace directory or --store URL")
    return directory or str(store)


def _table(traces: list[Trace]) -> Table:
    table = Table()
    table.add_column("guard id", min_width=max((len(t.guard_id) for t in traces), default=0), no_wrap=True)
    table.add_column("written", no_wrap=True)
    table.add_column("request", min_width=24)
    for column in ("tokens", "steps", "cues", "triggers"):
        table.add_column(column, justify="right")
    table.add_column("clean")
    for trace in traces:
        row = summary(trace)
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trace.created))
        table.add_row(
            harmless(trace.guard_id),
            written,
            _request(trace, 60),
            *(str(row[key]) for key in ("tokens", "steps", "cues", "interventions")),
            "yes" if row["clean"] else Text("no", style="bold red"),
        )
    return table


@app.command()
def show(
    place: Annotated[
        list[str],
        typer.Argument(
            metavar="[DIR] ID",
            help="The directory that `serve` writes traces to (none with --store), and an id from `traces ls` or a "
            "response's x-reasonguard-id header.",
        ),
    ],
    store: MaybeStoreUrl = None,
    model: Annotated[
        str | None, typer.Option(help="Model to decode the tokens with; by default the one in the trace.")
    ] = None,
) -> None:
    """Show one request step by step: scores, cues and the triggers that answered them.

    Example: cli.py traces show runs/traces 4f0c... --model demo
    """
    *directories, guard_id = place
    if len(directories) > 1:
        raise UserError("traces show", got=" ".join(place), wanted="a directory and an id")
    trace = _find(_where(Path(directories[0]) if directories else None, store), guard_id)
    decode = decoder(trace, model)
    console = Console()
    receipt = trace.receipt
    console.print(Text("request: ", style="bold"), _request(trace, 2000))
    console.print(
        Text(f"policy {receipt.policy} {receipt.policy_hash}, detector {receipt.detector}, engine {receipt.engine}"),
        Text(f"seen {receipt.seen}, scored {receipt.scored}, unscored {receipt.unscored}, "
             f"injected tokens {receipt.injected_tokens}"),
        sep="\n",
    )  # fmt: skip
    for error in receipt.errors:
        console.print(Text("error: ", style="bold red"), harmless(error))
    console.print(_steps(trace, decode))


def _steps(trace: Trace, decode: Decoder | None) -> Table:
    names = {i.at: i.trigger_id for i in trace.receipt.interventions}
    table = Table("tokens", "zone", "score", "what", "text", show_lines=False)
    for step in trace.steps:
        style = "bold green" if step.injected else "bold red" if step.cue else ""
        what = names.get(step.start, "trigger") if step.injected else "cue" if step.cue else ""
        score = "" if step.injected else "none" if step.score is None else f"{step.score:.3f}"
        table.add_row(f"{step.start}-{step.end}", step.zone, score, what, _text(trace, step, decode), style=style)
    return table


def _request(trace: Trace, limit: int) -> Text:
    return harmless(trace.request, limit) if trace.log_content == "full" else Text("(not kept)", style="dim")


def _text(trace: Trace, step: StepRecord, decode: Decoder | None) -> Text:
    if trace.log_content == "none":
        return Text("(not kept)", style="dim")
    if decode is None:
        return Text("(give --model to read it)", style="dim")
    return harmless(decode(trace.output_ids[step.start : step.end]))


def decoder(trace: Trace, model: str | None) -> Decoder | None:
    """A tokenizer that fits the trace; another tokenizer's text would be nonsense, so it is a UserError."""
    from guard.runtime import tokenizer_hash
    from guard.sidecar.model import find_model

    if model is None and not Path(trace.model).is_dir():
        return None
    tokenizer: Tokenizer = find_model(model or trace.model).tokenizer
    if tokenizer_hash(tokenizer) != trace.tokenizer_hash:
        if model is None:
            return None
        raise UserError(
            f"Trace {trace.guard_id} was written with another tokenizer", got=tokenizer_hash(tokenizer),
            wanted=f"{trace.tokenizer_hash}, the tokenizer of {trace.model}",
        )  # fmt: skip
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def decoders(model: str | None) -> Callable[[Trace], Decoder | None]:
    """`decoder` for many traces: reading a tokenizer takes a tenth of a second and more, so each is read once."""
    known: dict[tuple[str, str], Decoder | None] = {}

    def of(trace: Trace) -> Decoder | None:
        key = (trace.model, trace.tokenizer_hash)
        if key not in known:
            known[key] = decoder(trace, model)
        return known[key]

    return of


def harmless(text: str, limit: int = 400) -> Text:
    """Hostile text for a terminal: control, format and private characters go, and nothing is read as markup."""
    flat = " ".join(text.split())
    kept = "".join(c for c in flat if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return Text(kept if len(kept) <= limit else kept[: limit - 1] + "…")


app.command()(ingest)
app.command()(export)
app.command()(prune)
