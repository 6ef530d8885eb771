"""Commands on who may open the review pages: `reviewers add | ls | remove`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard.sidecar.pages.reviewers import Reviewers

app = typer.Typer(no_args_is_help=True, help="Who may open the review pages of `serve --reviewers FILE`.")
File = Annotated[Path, typer.Option("--file", help="The reviewers' file: names and scrypt hashes.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="As it will stand beside the labels.")]
_FILE = Path("runs/reviewers.json")


@app.command()
def add(name: Name, file: File = _FILE) -> None:
    """Add a reviewer, or give one a new password; it is asked for, never an argument.

    Example: cli.py reviewers add ann --file runs/reviewers.json
    """
    password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    new = Reviewers(file).add(name, password)
    typer.echo(
        f"{name} {'may' if new else 'has a new password and may'} log in at /guard/ of `serve --reviewers {file}`."
    )


@app.command()
def ls(file: File = _FILE) -> None:
    """List the reviewers.

    Example: cli.py reviewers ls
    """
    for name in sorted(Reviewers(file).hashes()):
        typer.echo(name)


@app.command()
def remove(name: Name, file: File = _FILE) -> None:
    """Take a reviewer out; what they said stays.

    Example: cli.py reviewers remove ann
    """
    Reviewers(file).remove(name)
    typer.echo(f"{name} can no longer log in.")
