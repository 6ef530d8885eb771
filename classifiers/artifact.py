"""A trained artifact on disk: a directory of files and the manifest that names their hashes, checked before use.

Loads with onnxruntime and numpy alone. A file that is missing, damaged or of another kind is a `UserError`, because a
guard that runs on an unknown model guards nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, ValidationError

from classifiers.features import SCHEME, FeatureConfig
from classifiers.stats import Rate
from guard.errors import UserError

MANIFEST_FILE = "manifest.json"
Kind = Literal["detector", "judge"]


class Manifest(BaseModel):
    """What an artifact is, what it was trained on and how well it did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    version: str
    """Kind and 12 digits over the files' hashes: the same bytes have the same version."""
    files: dict[str, str]
    """Name and sha256 of every file beside the manifest."""
    features: FeatureConfig
    threshold: float
    """A score at or above it counts."""
    clear_below: tuple[float, ...] = ()
    """First tier: for each bucket of the request's risk, the logit below which a step is no cue without the encoder."""
    cleared_score: tuple[float, ...] = ()
    """The score of a cleared step in each bucket: the share of cues among those of the validation part."""
    training_data: str
    """sha256 over the training rows."""
    training: dict[str, str | int | float]
    """How it was trained: seed, rows, the false-alarm rate asked for."""
    created: str
    """ISO date and time, UTC."""
    metrics: dict[str, Rate]
    """On held-out requests, each with n and a 95 % interval."""


def version_of(kind: Kind, files: dict[str, str]) -> str:
    """The version of an artifact with these files (name: sha256)."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return f"{kind}-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def fingerprint(path: Path) -> str:
    """Kind and 12 digits over the manifest of the artifact in directory `path`, and so over everything that decides:
    its files, by their hashes, and its thresholds, which `version` leaves out. UserError as in `load_files`."""
    manifest = _read_manifest(path)
    return f"{manifest.kind}-{hashlib.sha256((path / MANIFEST_FILE).read_bytes()).hexdigest()[:12]}"


def load_files(path: Path, kind: Kind) -> tuple[Manifest, dict[str, bytes]]:
    """Read and check the artifact in directory `path`: its manifest and its files by name.

    UserError: no such directory or file, unreadable manifest, another kind or feature scheme, a file whose sha256 is
    not the manifest's.
    """
    manifest = _read_manifest(path)
    fix = f"Train it again with `classifier {'train' if kind == 'detector' else 'judge-train'} --out DIR`"
    if manifest.kind != kind:
        raise UserError(f"the artifact {path} is of another kind", got=manifest.kind, wanted=kind)
    if manifest.features.scheme != SCHEME:
        raise UserError(
            f"the artifact {path} was made with other features",
            got=f"scheme {manifest.features.scheme}",
            wanted=f"scheme {SCHEME}",
            fix=fix,
        )
    files = {}
    for name, wanted in manifest.files.items():
        if Path(name).name != name:
            raise UserError(f"{path / MANIFEST_FILE} names a file outside its directory", got=name)
        files[name] = _read(path / name, fix)
        found = hashlib.sha256(files[name]).hexdigest()
        if found != wanted:
            raise UserError(
                f"{path / name} is damaged: its sha256 is not its manifest's", got=found, wanted=wanted, fix=fix
            )
    return manifest, files


def file_of(files: dict[str, bytes], name: str, path: Path) -> bytes:
    """One file of an artifact; UserError when its manifest does not name it."""
    if name not in files:
        raise UserError(
            f"{path / MANIFEST_FILE} names no {name}", got=", ".join(sorted(files)) or "no files", wanted=name
        )
    return files[name]


def session(payload: bytes, name: str) -> ort.InferenceSession:
    """An ONNX session on one thread; UserError when onnxruntime cannot read the model."""
    options = ort.SessionOptions()
    # One thread: every tensor-parallel rank must add in the same order, and the engine needs the other cores.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime cannot load {name}", got=str(error)) from error


def _read(path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}", got=error.strerror or str(error), wanted="a trained artifact", fix=fix
        ) from None


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise UserError(
            f"no artifact at {path}",
            wanted=f"a directory with {MANIFEST_FILE} and the files it names",
            fix="Give the directory that `classifier train --out` wrote",
        )
    text = _read(path / MANIFEST_FILE, "Copy the whole artifact directory, or train it again")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path / MANIFEST_FILE} is malformed at {key}", got=first["msg"]) from None
