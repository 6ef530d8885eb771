"""The command `replay`: recorded traces decided again, and what another policy or detector would have flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from guard.cli import harmless
from guard.errors import UserError
from guard.policy import load_policy
from guard.traces import ReadReport, Trace, read_traces

if TYPE_CHECKING:
    from classifiers.stats import Rate
    from guard.policy import Policy
    from guard.prompt import PromptReader
    from guard.replay_report import ExactReport, FirstCue, ReplayReport, ShadowReport, SweepRow
    from guard.runtime import GuardRuntime

ROWS = 50
"""The table of flagged requests holds at most so many."""


def replay(
    traces: Annotated[Path, typer.Option(help="Directory that `serve` writes traces to.")],
    policy: Annotated[Path | None, typer.Option(help="Policy file (YAML); by default the built-in policy.")] = None,
    detector: Annotated[Path | None, typer.Option(help="Detector directory; by default the packaged one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer wrote the traces; by default the one they name.")
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds to compare, within 0 and 1, separated by commas.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="JSON file for the whole report.")] = None,
) -> None:
    """Decide recorded traces again.

    Traces of the same policy and detector must come out as they were recorded: exit code 1 if one does not. Of the
    others it prints what this policy and detector would have flagged.

    Example: cli.py replay --traces runs/traces --policy stricter.yaml --thresholds 0.5,0.7,0.9
    """
    values, settings = _thresholds(thresholds), load_policy(policy)
    found, read = read_traces(traces)
    if not found:
        raise UserError(f"{traces} holds no traces", got=f"{read.files} files, {read.malformed} malformed lines")
    runtime, reader = _prepare(settings, detector, model or _recorded_model(found))
    report = _run([reader.restored(trace) for trace in found], runtime, reader, values)
    if sum(report.skipped.values()) == len(found):
        raise UserError(
            f"No trace in {traces} can be replayed", got=_counts(report.skipped),
            wanted=f"clean traces of the tokenizer {runtime.tokenizer_hash}",
        )  # fmt: skip
    if out is not None:
        _write(out, read, report)
    _print(Console(), read, report)
    if report.exact.differing:
        raise typer.Exit(1)


def _thresholds(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UserError("--thresholds", got=text, wanted="numbers within 0 and 1, separated by commas: 0.5,0.7,0.9")
    return values


def _recorded_model(traces: list[Trace]) -> str:
    here = next((trace.model for trace in traces if Path(trace.model).is_dir()), None)
    if here is None:
        raise UserError(
            "The model that wrote the traces is not here", got=harmless(traces[0].model).plain,
            fix="Give its directory with --model",
        )  # fmt: skip
    return here


def _prepare(policy: Policy, detector: Path | None, model: str) -> tuple[GuardRuntime, PromptReader]:
    """The runtime and the reader that the live engine builds from the same policy, detector and model."""
    from classifiers.detector import Detector
    from guard.prompt import PromptReader
    from guard.runtime import GuardRuntime
    from guard.sidecar.model import find_model

    loaded, served = Detector.load(detector), find_model(model)
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            "replay reads chat templates with transformers", fix="Install the extra `cpu` or `gpu`"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(served.location)
    except (OSError, ValueError) as error:
        raise UserError(f"The tokenizer of {model} cannot be loaded", got=str(error).split("\n")[0]) from error
    runtime = GuardRuntime.build(policy, loaded, tokenizer.backend_tokenizer, served.location, tokenizer.eos_token_id)
    return runtime, PromptReader.build(tokenizer, runtime.table, runtime.grammar)


def _run(traces: list[Trace], runtime: GuardRuntime, reader: PromptReader, thresholds: list[float]) -> ReplayReport:
    from guard.replay import replay as decide_again

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Replaying", total=len(traces))
        return decide_again(traces, runtime, reader, thresholds, lambda: progress.advance(task))


def _write(path: Path, read: ReadReport, report: ReplayReport) -> None:
    whole = {"read": read.model_dump(), **report.model_dump(mode="json")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Report {path} cannot be written", got=error.strerror) from error


def _print(console: Console, read: ReadReport, report: ReplayReport) -> None:
    console.print(
        harmless(f"Policy {report.policy} {report.policy_hash}, {report.detector}, threshold {report.threshold:g}."),
        f"{read.traces} traces, {sum(report.skipped.values())} skipped{_reasons(report.skipped)}; "
        f"{read.malformed} malformed lines, {read.superseded} superseded.",
        sep="\n", highlight=False,
    )  # fmt: skip
    if report.exact.traces:
        _print_exact(console, report.exact)
    if report.shadow.traces:
        _print_shadow(console, report.shadow)
    if report.sweep:
        console.print(_sweep(report.sweep))


def _print_exact(console: Console, report: ExactReport) -> None:
    differ = len(report.differing)
    console.print(
        f"Same policy and detector: {report.traces - differ} of {report.traces} traces came out as recorded.",
        highlight=False,
    )
    if not differ:
        return
    table = Table("guard id", "field", "recorded", "now", title=f"{report.differences} differences")
    for item in report.first:
        table.add_row(harmless(item.guard_id), item.field, harmless(str(item.recorded)), harmless(str(item.now)))
    if report.differences > len(report.first):
        table.caption = f"the first {len(report.first)}"
    console.print(table)


def _print_shadow(console: Console, report: ShadowReport) -> None:
    flagged = [trace for trace in report.traces if trace.now or trace.recorded]
    # What changed comes first.
    flagged.sort(key=lambda trace: trace.now is not None and trace.recorded is not None)
    table = Table("guard id", "request", "first cue now", "as recorded", title="Another policy or detector: flagged")
    for trace in flagged[:ROWS]:
        table.add_row(harmless(trace.guard_id), harmless(trace.request, 60), _place(trace.now), _place(trace.recorded))
    if len(flagged) > ROWS:
        table.caption = f"{ROWS} of {len(flagged)}; --json writes them all"
    totals = Table("requests flagged", "share [95 % interval]", "n")
    shares = {
        "now": report.now, "as recorded": report.recorded, "both": report.both, "only now": report.only_now,
        "only as recorded": report.only_recorded,
    }  # fmt: skip
    for name, rate in shares.items():
        totals.add_row(name, _share(rate), str(rate.n))
    console.print(table, totals)


def _sweep(rows: list[SweepRow]) -> Table:
    table = Table(title="Thresholds, over all replayed traces [95 % interval]")
    for column in ("threshold", "requests flagged", "n", "median token of the first cue", "cues per 1,000 steps"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.threshold:g}", _share(row.flagged), str(row.flagged.n), _number(row.token), _number(row.per_1000)
        )
    return table


def _place(cue: FirstCue | None) -> str:
    return "" if cue is None else f"step {cue.step}, token {cue.token}"


def _share(rate: Rate) -> Text:
    return Text(f"{rate.rate:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]")


def _number(rate: Rate | None) -> Text:
    return Text("" if rate is None else f"{rate.rate:.1f} [{rate.lo:.1f}, {rate.hi:.1f}], n {rate.n}")


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))


def _reasons(skipped: dict[str, int]) -> str:
    return f" ({_counts(skipped)})" if skipped else ""
