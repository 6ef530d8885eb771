"""The commands on the store: `traces ingest`, `traces export`, `traces prune`; and how every command opens one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from guard.errors import UserError

if TYPE_CHECKING:
    from guard.store.store import Store

_STORE = typer.Option(
    "--store", metavar="URL", help="sqlite:///PATH or postgresql://USER@HOST/DB (password: PGPASSWORD, ~/.pgpass)."
)
StoreUrl = Annotated[str, _STORE]
MaybeStoreUrl = Annotated[str | None, _STORE]
_DAY = 86_400.0


@contextlib.contextmanager
def opened(url: str, *, migrate: bool = False) -> Iterator[Store]:
    """The store at a URL; whatever goes wrong with it is a UserError."""
    try:
        from sqlalchemy.exc import SQLAlchemyError

        from guard.store.store import Store, reason
    except ModuleNotFoundError as error:
        raise UserError("The store needs SQLAlchemy, Alembic and psycopg", fix="Install the extra `sidecar`") from error
    try:
        store = Store.open(url, migrate=migrate)
        try:
            yield store
        finally:
            store.close()
    except SQLAlchemyError as error:
        raise UserError("The store failed", got=reason(error)) from error


def ingest(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `serve` has written traces to.")],
    store: StoreUrl,
) -> None:
    """Feed a store from a trace directory, as `serve` does by itself; what it holds already is passed over.

    Example: cli.py traces ingest runs/old-traces --store postgresql://guard@db/traces
    """
    from guard.store.ingest import Fed, Ingester

    if not directory.is_dir():
        raise UserError(f"Trace directory {directory} does not exist")
    total = Fed()
    with opened(store, migrate=True) as target:
        ingester = Ingester(target, directory)
        with _progress("Reading the spool", ingester.behind()) as tick:
            left = ingester.behind()
            while (fed := ingester.step()) is not None:
                total.add(fed)
                now = ingester.behind()
                tick(left - now)
                left = now
    typer.echo(f"{total.traces} traces taken from {total.lines} lines; {total.malformed} malformed.", err=True)


def export(
    store: StoreUrl,
    out: Annotated[Path, typer.Option(help="The Parquet file.")],
    since: Annotated[datetime | None, typer.Option(help="From this day on (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Up to this day, which no longer counts (UTC).")] = None,
    policy_hash: Annotated[str | None, typer.Option(help="Only of this policy.")] = None,
    weights: Annotated[str | None, typer.Option(help="Only of the model with these weights.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    intervened: Annotated[bool, typer.Option("--intervened", help="Only those with an intervention.")] = False,
) -> None:
    """Write traces, their steps, interventions and reviews to a Parquet file.

    Example: cli.py traces export --store sqlite:///runs/traces/store.db --out traces.parquet --since 2026-11-01
    """
    with opened(store) as source:
        from guard.store.export import export as write
        from guard.store.reading import Filter, count

        wanted = Filter(_moment(since), _moment(until), policy_hash, weights, tenant, intervened)
        with _progress("Exporting", count(source, wanted)) as tick:
            written = write(source, out, wanted, tick)
    typer.echo(f"{written} traces in {out}.", err=True)


def prune(
    store: StoreUrl,
    older_than: Annotated[int, typer.Option(min=1, metavar="DAYS", help="Traces from before so many days.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Delete the old spool files of this directory too.")
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Only requests and token ids go; receipts, steps and reviews stay.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many, change nothing.")] = False,
) -> None:
    """Delete what is too old, reviews included: run it daily.

    Spool files go as a whole, once the store has read them; without DIR they stay and keep their content.

    Example: cli.py traces prune runs/traces --store sqlite:///runs/traces/store.db --older-than 90
    """
    cutoff = time.time() - older_than * _DAY
    with opened(store) as target:
        from guard.store import retention

        found = retention.count_old(target, cutoff, content)
        if dry_run:
            typer.echo(f"{found} traces from before {_day(cutoff)}.", err=True)
            return
        with _progress("Pruning", found) as tick:
            done = (retention.prune_content if content else retention.prune)(target, cutoff, tick)
        said = f"{done} traces from before {_day(cutoff)} {'bared of content' if content else 'deleted'}"
        if directory is not None:
            files = retention.prune_files(target, directory, cutoff)
            said += f"; {files.deleted} spool files deleted, {files.waiting} not read to their end"
    typer.echo(f"{said}.", err=True)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _moment(day: datetime | None) -> float | None:
    return None if day is None else day.replace(tzinfo=UTC).timestamp()


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
