"""A trained artifact on disk: model.onnx and manifest.json, checked before use.

Loads with onnxruntime and numpy alone. A file that is missing, damaged or of another kind is a `UserError`, because a
guard that runs on an unknown model guards nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, ValidationError

from classifiers.features import PADDING, SCHEME, FeatureConfig
from classifiers.stats import Rate
from guard.errors import UserError

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
Kind = Literal["detector", "judge"]


class Manifest(BaseModel):
    """What an artifact is, what it was trained on and how well it did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    version: str
    """Kind and the first 12 digits of the model's hash: the same bytes have the same version."""
    sha256: str
    """Of model.onnx."""
    features: FeatureConfig
    threshold: float
    """A score at or above it counts."""
    training_data: str
    """sha256 over the training rows."""
    training: dict[str, str | int | float]
    """How it was trained: seed, rows, the false-alarm rate asked for."""
    created: str
    """ISO date and time, UTC."""
    metrics: dict[str, Rate]
    """On held-out topics, each with n and a 95 % interval."""


class Artifact:
    """A checked artifact, ready to run on padded ids."""

    def __init__(self, manifest: Manifest, session: ort.InferenceSession) -> None:
        self.manifest = manifest
        self._session = session
        self._weighted = any(each.name == "weights" for each in session.get_inputs())

    @classmethod
    def load(cls, path: Path, kind: Kind) -> Artifact:
        """Read and check the artifact in directory `path`.

        UserError: no such directory or file, unreadable manifest, another kind or feature scheme, a model whose sha256
        is not the manifest's, or a model that onnxruntime cannot read.
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
        payload = _read(path / MODEL_FILE, fix)
        found = hashlib.sha256(payload).hexdigest()
        if found != manifest.sha256:
            raise UserError(
                f"{path / MODEL_FILE} is damaged: its sha256 is not its manifest's",
                got=found,
                wanted=manifest.sha256,
                fix=fix,
            )
        return cls(manifest, _session(payload, path))

    def run(
        self, rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the probabilities [n, heads] of n rows of ids; `weights` are row-aligned, 1 where not given."""
        width = max((len(row) for row in rows), default=0) or 1
        ids = np.full((len(rows), width), PADDING, np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        feed: dict[str, npt.NDArray[np.generic]] = {"ids": ids}
        if self._weighted:
            # Padding may weigh 1: its row of the table is zero.
            values = np.ones((len(rows), width), np.float32)
            for index, line in enumerate(weights or ()):
                values[index, : len(line)] = line
            feed["weights"] = values
        (scores,) = self._session.run(["scores"], feed)
        return np.asarray(scores, np.float32)


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
            wanted=f"a directory with {MODEL_FILE} and {MANIFEST_FILE}",
            fix="Give the directory that `classifier train --out` wrote",
        )
    text = _read(path / MANIFEST_FILE, "Copy the whole artifact directory, or train it again")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path / MANIFEST_FILE} is malformed at {key}", got=first["msg"]) from None


def _session(payload: bytes, path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # One thread: a step costs microseconds, and every tensor-parallel rank must add in the same order.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime cannot load {path / MODEL_FILE}", got=str(error)) from error
