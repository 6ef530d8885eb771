"""`keys add | ls | revoke`: the file that `serve --keys` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from guard.errors import UserError
from guard.keys import Key, Keys, Quotas, change, hash_of, load_keys, new_key, policy_of, policy_path
from guard.policy import Policy, load_policy
from guard.settings import validated

app = typer.Typer(no_args_is_help=True, help="Who may ask a server, under which policy and within which quotas.")

File = Annotated[Path, typer.Option("--keys", metavar="FILE", help="The file that `serve --keys` reads.")]
DEFAULT = Path("keys.yaml")
_RELOAD = "A running `serve` takes it over at SIGHUP or POST /guard/admin/reload."


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The tenant: letters, digits, `.`, `_` and `-`.")],
    keys: File = DEFAULT,
    policy: Annotated[Path | None, typer.Option(help="Its policy file; by default serve's.")] = None,
    shadow: Annotated[
        bool | None, typer.Option("--shadow/--no-shadow", help="Decide and log, never force; by default the policy's.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="At most so many; by default no limit.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="At most so many at once.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="At most so many, prompts included.")] = None,
) -> None:
    """Make a key, print it once, and keep its hash. The key alone goes to standard output.

    Example: cli.py keys add team-a --policy strict.yaml --requests-per-minute 60
    """
    load_policy(policy)
    quotas = {
        "requests_per_minute": requests_per_minute, "concurrent": concurrent, "tokens_per_day": tokens_per_day,
    }  # fmt: skip
    key = new_key()
    raw = {"name": name, "hash": hash_of(key), "policy": _beside(policy, keys), "shadow": shadow, "quotas": quotas}
    entry = validated(Key, raw, f"Key {name}", quotes=False)

    def extended(known: Keys) -> Keys:
        if any(each.name == name for each in known.keys):
            raise UserError(f"{keys} has a key for {name} already", fix="Revoke it first, or take another name")
        return Keys(keys=(*known.keys, entry))

    change(keys, extended)
    typer.echo(key)
    typer.echo(f"The key of {name}: it is shown this once, {keys} keeps its hash. {_RELOAD}", err=True)


@app.command()
def ls(keys: File = DEFAULT) -> None:
    """List tenants, their policies and quotas.

    Example: cli.py keys ls --keys keys.yaml
    """
    table = Table("tenant", "policy", "policy hash", "shadow", *Quotas.model_fields)
    for key in load_keys(keys).keys:
        path = policy_path(keys, key)
        limits = [getattr(key.quotas, each) for each in Quotas.model_fields]
        table.add_row(
            key.name, "serve's" if path is None else str(path),
            "" if path is None else policy_of(keys, key, Policy()).hash,
            {None: "", True: "yes", False: "no"}[key.shadow], *("" if each is None else str(each) for each in limits),
        )  # fmt: skip
    Console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The tenant.")], keys: File = DEFAULT) -> None:
    """Take a key out of the file.

    Example: cli.py keys revoke team-a
    """

    def without(known: Keys) -> Keys:
        left = tuple(each for each in known.keys if each.name != name)
        if len(left) == len(known.keys):
            raise UserError(f"{keys} has no key for {name}", fix="`keys ls` lists what there is")
        return Keys(keys=left)

    load_keys(keys)
    change(keys, without)
    typer.echo(f"The key of {name} is revoked. {_RELOAD}", err=True)


def _beside(policy: Path | None, keys: Path) -> Path | None:
    """The policy as the file of keys names it: relative where it lies below that file's directory."""
    if policy is None:
        return None
    place, root = policy.resolve(), keys.parent.resolve()
    return place.relative_to(root) if place.is_relative_to(root) else place
