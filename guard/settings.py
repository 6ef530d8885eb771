"""Reads a file of settings that a person wrote; what is wrong with it is a UserError that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from guard.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The YAML mapping in a file; an empty file is an empty one. `what` begins the sentence of a UserError."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read", got=error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not YAML", got=str(error).split("\n")[0]) from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path}", got=type(raw).__name__, wanted="a mapping of settings")
    return raw


def validated(model: type[Model], raw: Mapping[str, Any], where: str, *, quotes: bool = True) -> Model:
    """The mapping as a model. `where` begins the sentence; `quotes`: the value at fault may be shown."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{where}, key `{key}`: {first['msg']}",
            got=first["input"] if quotes else None,
            fix=f"Known keys: {', '.join(model.model_fields)}",
        ) from error
