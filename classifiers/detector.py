"""The detector as the guard runs it: how much a step shows intent to comply, given the request and the step before.

Two tiers. The first, hashed and linear, clears steps that are no cue whatever the request; the encoder reads the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from classifiers.artifact import Manifest, file_of, load_files, session
from classifiers.encoder import Encoder, Vector
from classifiers.features import risk_bucket, step_ids
from classifiers.hashed import HashedModel

DEFAULT = Path(__file__).parent / "default"
ENCODER_FILE, HEAD_FILE, FIRST_FILE, TOKENIZER_FILE = "encoder.onnx", "head.onnx", "first.onnx", "tokenizer.json"
REPLAY_FILE = "replay.npz"
"""For training only: vectors of the public labelled traces."""
CUE, RISK = 0, 1
"""Columns of the head's output."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the detector keeps of a request: its vector, its risk (a probability) and the bucket of that risk."""

    vector: Vector
    risk: float
    bucket: int


class Detector:
    """Scores steps; pure, so the same steps under the same request have the same scores in every process."""

    def __init__(self, manifest: Manifest, files: dict[str, bytes], path: Path) -> None:
        self.manifest = manifest
        self.version = manifest.version
        self.threshold = manifest.threshold
        self.encoder = Encoder(
            file_of(files, ENCODER_FILE, path), file_of(files, TOKENIZER_FILE, path), str(path / ENCODER_FILE)
        )
        self._head = session(file_of(files, HEAD_FILE, path), str(path / HEAD_FILE))
        self._first = HashedModel(file_of(files, FIRST_FILE, path), str(path / FIRST_FILE))

    @classmethod
    def load(cls, path: Path | None = None) -> Detector:
        """Load the detector in directory `path`, or the one shipped in the package. Errors: `load_files`."""
        path = path or DEFAULT
        return cls(*load_files(path, "detector"), path)

    def request(self, request: str) -> RequestContext:
        """Return the context that this request's steps are scored in; compute it once per request."""
        vector = self.encoder.embed(request)
        risk = float(self._run_head(vector, np.zeros_like(vector), vector)[RISK])
        if not np.isfinite(risk):
            risk = 1.0
        return RequestContext(vector, risk, risk_bucket(risk, self.manifest.features))

    def score(
        self, context: RequestContext, steps: Sequence[str], previous: str = "", *, first_tier: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return the probability [n] that each of n consecutive steps is a cue; `previous` came before the first.

        A step without words scores 0. A score that is not a number counts as 1: unreadable is not safe. Steps cleared
        by the first tier have the manifest's score for such steps; `first_tier=False` encodes every step.
        """
        scores = np.zeros(len(steps), np.float32)
        for index, (before, step) in enumerate(zip([previous, *steps], steps, strict=False)):
            scores[index] = self._score(context, step, before, first_tier)
        return scores

    def first_tier(self, steps: Sequence[str]) -> list[float | None]:
        """Return the first tier's probability of each step; None for a step without words."""
        rows = [step_ids(step, self.manifest.features) for step in steps]
        return [float(self._first.run([ids])[0, 0]) if ids else None for ids in rows]

    def score_vectors(
        self, request: Vector, steps: npt.NDArray[np.float32], previous: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the scores [n] of steps whose vectors [n, width] are known; the first tier has no say."""
        pairs = zip(steps, previous, strict=True)
        return np.array([self._run_head(step, last, request)[CUE] for step, last in pairs], np.float32)

    def _score(self, context: RequestContext, step: str, before: str, first_tier: bool) -> float:
        (first,) = self.first_tier([step])
        if first is None:
            return 0.0
        if first_tier and first < self.manifest.clear_below[context.bucket]:
            return self.manifest.cleared_score[context.bucket]
        vector = self.encoder.embed(step)
        last = self.encoder.embed(before) if before else np.zeros_like(vector)
        score = float(self._run_head(vector, last, context.vector)[CUE])
        return score if np.isfinite(score) else 1.0

    def _run_head(self, step: Vector, previous: Vector, request: Vector) -> npt.NDArray[np.float32]:
        feed = {"step": step[None], "previous": previous[None], "request": request[None]}
        (scores,) = self._head.run(["scores"], feed)
        return np.asarray(scores[0], np.float32)
