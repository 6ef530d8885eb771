"""`cli.py align promote | status | rollback`: which version of the model serves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.errors import UserError

if TYPE_CHECKING:
    from align.promote import Outcome
    from align.versions import Event

REFUSED = 3
"""Exit code of a run that the gate refused."""
SERVER_SECONDS = 300
SEEN_SECONDS = 5
"""Within these `serve` has seen that `current` has changed."""

Versions = Annotated[Path, typer.Option(help="Registry of versions; `serve --versions` follows it.")]
Gate = Annotated[Path | None, typer.Option(help="What must hold (YAML); by default the built-in gate.")]
Server = Annotated[
    str | None, typer.Option(metavar="URL", help="Wait until this `serve` answers with the version, proven.")
]


def promote(
    out: Annotated[Path, typer.Option(help="Directory of a finished run.")],
    versions: Versions = Path("runs/versions"),
    gate: Gate = None,
    force: Annotated[bool, typer.Option("--force", help="Put it in force even if the gate refuses; recorded.")] = False,
    server: Server = None,
) -> None:
    """Hold a run against the gate, and put it in force as a new version when it passes; else exit code 3.

    Example: `cli.py align promote --out runs/align --versions runs/versions --server http://127.0.0.1:8000`
    """
    from align import promote as promotion
    from align.disk import full_disk_told
    from align.gate import figures, load_gate
    from align.markdown import load_report
    from align.versions import locked

    settings = load_gate(gate, figures(load_report(out / "report.json")))
    with full_disk_told(versions), locked(versions) as registry:
        outcome = promotion.promote(registry, out, settings, force=force)
    settle(outcome, versions, server)


def settle(outcome: Outcome, versions: Path, server: str | None) -> None:
    """Tells what the gate said; exit code 3 when it refused."""
    for check in outcome.verdict.checks:
        typer.echo(f"{'passed' if check.passed else 'MISSED'}  {check.figure}: {check.got}, wanted {check.wanted}")
    if outcome.version is None:
        typer.echo("The gate refused: what is in force stays in force.", err=True)
        raise typer.Exit(REFUSED)
    typer.echo(f"Version {outcome.version} is in force; its card: {versions / str(outcome.version) / 'card.md'}")
    if server is not None:
        typer.echo(wait_for(server, outcome.version))


def rollback(
    versions: Versions = Path("runs/versions"),
    to: Annotated[
        int | None,
        typer.Option(min=0, help="Version to go back to; 0 is the model as it came. Default: the one before."),
    ] = None,
    server: Server = None,
) -> None:
    """Put the version before the present one in force again.

    Example: `cli.py align rollback --versions runs/versions`
    """
    from align import promote as promotion
    from align.disk import full_disk_told
    from align.versions import locked

    with full_disk_told(versions), locked(versions) as registry:
        event: Event = promotion.roll_back(registry, to)
    typer.echo(f"Version {event.version} is in force again, instead of {event.before}.")
    if server is not None and event.version is not None:
        typer.echo(wait_for(server, event.version))


def status(
    versions: Versions = Path("runs/versions"),
    traces: Annotated[
        Path | None, typer.Option(help="Directory that `serve` writes traces to, for the intervention rates.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show what was promoted, refused and rolled back, with the intervention rate before and after.

    Rates are requests with an intervention per 1,000, with 95 % intervals. They are those of the traffic there was:
    when the requests change, so do they.

    Example: `cli.py align status --versions runs/versions --traces runs/traces`
    """
    from rich.console import Console

    from align import status as found
    from guard.weights import Registry

    now = found.status(Registry(versions), traces)
    if as_json:
        typer.echo(now.model_dump_json(indent=1))
        return
    Console().print(found.table(now))
    left = ", ".join(f"{count} of {reason}" for reason, count in now.left_out.items() if count)
    if left:
        typer.echo(f"Traces left out: {left}.", err=True)


def wait_for(server: str, version: int, seconds: float = SERVER_SECONDS) -> str:
    """A sentence once `serve` answers with the version; UserError with its reason when it does not."""
    import httpx

    began, problem = time.monotonic(), "no answer"
    while time.monotonic() < began + seconds:
        try:
            told = httpx.get(f"{server.rstrip('/')}/ready", timeout=90, trust_env=False).json()
        except (httpx.HTTPError, ValueError) as error:
            problem = f"no answer ({type(error).__name__})"
        else:
            if told.get("version") == version:
                return f"{server} serves version {version}."
            problem = str(told.get("version_problem") or told.get("reason") or f"version {told.get('version')}")
            # At first it may still tell of an earlier try.
            if problem.startswith(f"version {version} is not served") and time.monotonic() > began + SEEN_SECONDS:
                break
        time.sleep(0.5)
    raise UserError(f"{server} does not serve version {version}", got=problem, fix="`align rollback`, or see its log")
