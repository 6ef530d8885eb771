"""One training stage, as `accelerate launch` runs it in each of its processes.

accelerate launch --config_file align/configs/fsdp.yaml -m align.launch runs/align/adapter
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align import stage
from guard.errors import UserError


def main(out: Annotated[Path, typer.Argument(help="Directory of a stage that `cli.py align train` prepared.")]) -> None:
    """Train the stage in OUT, or go on with it."""
    try:
        stage.run(out)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
