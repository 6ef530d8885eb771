"""Reads a file of settings that a person wrote; what is wrong with it is a UserError that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from guard.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: the last of two would win without a word, `fail_mode: open` too."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base has it."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, "a key stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        """A date as the text that it is."""
        return self.construct_scalar(node)


# A name may look like a date. The base reads dates, until a package that vLLM brings makes it read text instead.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_text)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The YAML mapping in a file; an empty file is an empty one. `what` begins the sentence of a UserError."""
    raw = read_yaml(path, what)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path}", got=type(raw).__name__, wanted="a mapping of settings")
    return raw


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; None for an empty one. `what` begins the sentence of a UserError."""
    try:
        # The loader is a safe one.
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read", got=error.strerror or str(error)) from error
    # Bytes that are no UTF-8 are a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what} {path} is not YAML", got=_said(error)) from error
    except RecursionError as error:
        raise UserError(f"{what} {path} is nested too deeply", wanted="a mapping of settings") from error


def _said(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return str(error).split("\n")[0]
    return f"{error.problem} (line {error.problem_mark.line + 1})"


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
