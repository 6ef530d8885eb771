"""Which weights: a short hash of a model's files, and the registry of promoted versions that `serve` follows.

    DIR/current          the version in force; 0 is the model that was aligned, as it came
    DIR/history.jsonl    what was promoted and rolled back, and when
    DIR/1/               version 1: model/ (merged), adapter/, manifest.json, gate.json, card.md

This module only reads; `align.versions` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import UserError

BASE = 0
"""The version that stands for the model as it came."""
#: Files up to this size are hashed whole, larger ones by samples: 4 MiB of a shard, some 10 ms.
_WHOLE = 64 * 1024 * 1024
_SAMPLES = 1024
_SAMPLE_BYTES = 4096
_CHUNK = 4 * 1024 * 1024


def weights_hash(model: str) -> str:
    """12 hex digits over config.json and the weights files, or samples of those that are large: quick at any size.

    Training changes whole matrices, so samples spread over a file see it; what was damaged in between is the business
    of `Registry.verify`. A hub name is read from the local cache, without any network; empty where that does not hold
    all of the model. OSError when a file cannot be read.
    """
    path = Path(model)
    local = path.is_dir()
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]) if local else _cached(model)
    if not local and not weights:
        return ""
    digest = hashlib.sha256(((path if local else weights[0].parent) / "config.json").read_bytes())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if size <= _WHOLE:
            digest.update(file.read_bytes())
            continue
        with file.open("rb") as source:
            for i in range(_SAMPLES):
                source.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(source.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def _cached(name: str) -> list[Path]:
    """The weights files of a hub model in the local cache, those that its index names; none unless all are there."""
    # tokenizers brings it.
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:
        config = None  # No name that a hub could have.
    if not isinstance(config, str):
        return []
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = Path(config).with_name(f"{whole}.index.json")
        parts = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.exists() else [whole]
        files = [index.with_name(part) for part in sorted(set(parts))]
        if all(file.exists() for file in files):
            return files
    return []


def known_weights(model: str, purpose: str) -> str:
    """The hash of a model whose files are to be exchanged or copied; UserError for a hub name."""
    if not Path(model).is_dir():
        raise UserError(
            f"{purpose} needs a model directory, whose files tell its weights apart", got=model,
            fix="Download the model and give its directory",
        )  # fmt: skip
    return weights_hash(model)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unlike(model: Path, other: Path) -> list[str]:
    """Tensors that only one of two models has, or that differ in shape; empty when one can take the other's place.

    vLLM keeps the old values where a checkpoint lacks a tensor, without an error, and does not recover from a wrong
    shape. An LM head that is tied to the embedding may be written or not.
    """
    ours, theirs = _shapes(model), _shapes(other)
    tied = json.loads((model / "config.json").read_text("utf-8")).get("tie_word_embeddings", False)
    names = (ours.keys() | theirs.keys()) - ({"lm_head.weight"} if tied else set())
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def _shapes(model: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


class LoadedWeights:
    """What an engine holds now: vLLM keeps the path in its configuration, and a reload changes it."""

    def __init__(self, path: Callable[[], str]) -> None:
        self._path = path
        self._hashed: tuple[str, str] = ("", "")

    def now(self) -> tuple[str, str]:
        """The model's path or name, and its hash: empty where it is not known, and when the files cannot be read."""
        path = self._path()
        if path != self._hashed[0]:
            try:
                self._hashed = (path, weights_hash(path))
            except OSError:
                self._hashed = (path, "")
        return self._hashed


class Manifest(BaseModel):
    """What one version is: `manifest.json`."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1)
    created: float
    """Unix time in seconds."""
    base: str
    """`weights_hash` of the model that was trained."""
    base_name: str
    weights: str
    """`weights_hash` of `model/`."""
    files: dict[str, str]
    """SHA-256 of every file of the version but this one, by its path inside the version."""


class Registry:
    """Reads a directory of versions; nothing in it is trusted before `verify`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def current(self) -> int:
        """The version in force, 0 while nothing was promoted; UserError when the pointer is damaged."""
        path = self.root / "current"
        try:
            text = path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return BASE
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read", got=str(error)) from error
        if not text.isdecimal():
            raise UserError(f"{path} is damaged", got=text, wanted="the number of a version")
        return int(text)

    def versions(self) -> list[int]:
        """All versions, the oldest first."""
        found = self.root.glob("[1-9]*/manifest.json")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())

    def directory(self, version: int) -> Path:
        """Where a version lies."""
        return self.root / str(version)

    def model(self, version: int) -> Path:
        """A version's merged model."""
        return self.directory(version).resolve() / "model"

    def manifest(self, version: int) -> Manifest:
        """UserError when the version does not exist or its manifest is damaged."""
        path = self.directory(version) / "manifest.json"
        try:
            found = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            known = ", ".join(map(str, self.versions())) or "none"
            raise UserError(f"Version {version} does not exist in {self.root}", wanted=f"one of: {known}") from error
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is damaged", got=str(error).split("\n")[0]) from error
        if found.version != version:
            raise UserError(f"{path} is damaged", got=f"version {found.version}", wanted=str(version))
        return found

    def verify(self, version: int, base: str) -> Manifest:
        """The manifest, after every file was read: UserError when one differs, is missing or is not in the manifest,
        or when the version was made from another model than `base` (its `weights_hash`)."""
        manifest, root = self.manifest(version), self.directory(version)
        if manifest.base != base:
            raise UserError(
                f"Version {version} was trained from another model", got=base,
                wanted=f"{manifest.base} ({manifest.base_name})", fix="Serve that model, or point --versions elsewhere",
            )  # fmt: skip
        files = manifest.files
        present = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "manifest.json"}
        wrong = sorted(present ^ files.keys())
        wrong += [name for name in sorted(present & files.keys()) if file_hash(root / name) != files[name]]
        if wrong:
            raise UserError(f"Version {version} in {self.root} is not what was promoted", got=", ".join(wrong[:5]))
        return manifest
