"""`python -m tests.conformance --url URL`: what a gateway does and does not do, as a table and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from tests.conformance.gateway import Gateway
from tests.conformance.run import GROUPS, results, table


def main(
    url: Annotated[str, typer.Option(help="The gateway, with or without /v1.")],
    key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    model: Annotated[str, typer.Option(help="Model to ask for; by default the first that is listed.")] = "",
    only: Annotated[str, typer.Option(help="`openai` or `guard`; by default both.")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="File that takes the results.")] = None,
) -> None:
    """Exits with 1 when a check fails."""
    key = os.environ.get(key_env, "") if key_env else ""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base, headers=headers, timeout=120, trust_env=False) as http:
        found = results(Gateway(http, model), [only] if only else list(GROUPS))
    Console().print(table(found))
    if out is not None:
        out.write_text(json.dumps([vars(each) for each in found], indent=1) + "\n")
    raise SystemExit(any(each.outcome == "fail" for each in found))


if __name__ == "__main__":
    typer.run(main)
