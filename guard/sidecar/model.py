"""Which model `serve` was asked for: checked before anything starts, its tokenizer read once."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEMO = "demo"
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ServedModel:
    """A model that exists: where it is, what clients call it, its tokenizer, its longest context in tokens, its end,
    its type."""

    location: str
    name: str
    tokenizer: Tokenizer
    context: int | None
    eos: int | None
    """The id that ends a reply."""
    kind: str | None
    """config.json's `model_type`."""


def find_model(asked: str) -> ServedModel:
    """`demo`, a directory, or a hub name. A UserError says what is missing."""
    if asked == DEMO:
        from demo.model import reasoner_model

        return _from_directory(reasoner_model(), DEMO)
    path = Path(asked).expanduser()
    if path.exists() or asked.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(asked):
        return _from_directory(path.resolve(), path.resolve().name)
    return _read(asked, asked, *(_hub_file(asked, name) for name in NEEDED))


def _from_directory(path: Path, name: str) -> ServedModel:
    wanted = "a directory with config.json and tokenizer.json, a hub name, or `demo`"
    if not path.exists():
        raise UserError(f"Model {path} does not exist", wanted=wanted)
    for needed in NEEDED[:2]:
        if not (path / needed).is_file():
            raise UserError(f"Model {path} holds no {needed}", wanted=wanted)
    return _read(str(path), name, *(path / needed for needed in NEEDED))


def _hub_file(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Model {name} is no directory here, and its {file} could not be had from the hub",
            got=str(error).split("\n")[0],
            fix="Give the directory that holds the model",
        ) from error


def _read(location: str, name: str, config: Path, tokenizer: Path, marks: Path) -> ServedModel:
    from tokenizers import Tokenizer

    try:
        settings = json.loads(config.read_text("utf-8"))
        read = Tokenizer.from_file(str(tokenizer))
    # tokenizers raises bare Exception for a damaged file.
    except Exception as error:
        raise UserError(f"Model {name}: config.json or tokenizer.json is damaged", got=str(error)) from error
    settings = settings if isinstance(settings, dict) else {}
    context = settings.get("text_config", settings).get("max_position_embeddings")
    limit = context if isinstance(context, int) else None
    return ServedModel(location, name, read, limit, _eos(read, marks), settings.get("model_type"))


def _eos(tokenizer: Tokenizer, path: Path) -> int | None:
    try:
        named = json.loads(path.read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = named.get("content") if isinstance(named, dict) else named
    found: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return found
