"""Keys: who may ask, under which policy, within which quotas. The file holds hashes only.

A key is 256 random bits, so one SHA-256 is enough: there is no dictionary to try, which is what salts and slow hashes
are against.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from guard.errors import UserError
from guard.policy import Policy, load_policy
from guard.settings import read_mapping, validated

PREFIX = "rg-"
_BYTES = 32
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]


class Quotas(BaseModel):
    """How much a tenant may ask for; None: as much as there is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Count | None = None
    """Also the burst: a tenant that was quiet may send so many at once."""
    concurrent: Count | None = None
    """Requests under way at the same time."""
    tokens_per_day: Count | None = None
    """Prompt and output, counted when a request's trace is written; they flow back evenly over 24 hours."""


class Key(BaseModel):
    """One entry of the file. Its name is the tenant, which traces carry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    policy: Path | None = None
    """Policy file, beside the file of keys if relative; None: the one that `serve` was given."""
    shadow: bool | None = None
    """Replaces the policy's `shadow`; None leaves it."""
    quotas: Quotas = Quotas()


class Keys(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Keys:
        for what in ("name", "hash"):
            seen = [getattr(key, what) for key in self.keys]
            twice = next((i for i, value in enumerate(seen) if value in seen[:i]), None)
            if twice is not None:
                raise ValueError(f"`{self.keys[twice].name}` has the {what} of an earlier entry")
        return self


def new_key() -> str:
    """A fresh key: shown once, kept nowhere."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def hash_of(key: str) -> str:
    """How the file names a key."""
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def load_keys(path: Path) -> Keys:
    """Reads the file; UserError names what is wrong, and never quotes it: it could be a key."""
    return validated(Keys, read_mapping(path, "File of keys"), f"File of keys {path}", quotes=False)


def policy_path(path: Path, key: Key) -> Path | None:
    """Where a key's policy lies; `path` is the file of keys."""
    return None if key.policy is None else path.parent / key.policy


def policy_of(path: Path, key: Key, default: Policy) -> Policy:
    """What a key's requests are under: its policy file's settings, or `default`, and its own `shadow`."""
    place = policy_path(path, key)
    policy = default if place is None else load_policy(place)
    return policy if key.shadow is None else policy.model_copy(update={"shadow": key.shadow})


def change(path: Path, edit: Callable[[Keys], Keys]) -> None:
    """Replaces the file in one move, readable by its owner alone; changes at the same time take turns. Comments in it
    are lost."""
    with _turn(path.parent):
        keys = validated(Keys, edit(load_keys(path) if path.exists() else Keys()).model_dump(), f"File of keys {path}",
                         quotes=False)  # fmt: skip
        entries = [key.model_dump(mode="json", exclude_defaults=True) for key in keys.keys]
        text = yaml.safe_dump({"keys": entries}, sort_keys=False, allow_unicode=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            draft.replace(path)
        except OSError as error:
            raise UserError(f"File of keys {path} cannot be written", got=error.strerror) from error


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[None]:
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"Directory {directory} cannot be opened", got=error.strerror) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
