"""The detector as the guard runs it: how much a step shows intent to comply, given the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from classifiers.artifact import Artifact
from classifiers.features import request_features, risk_bucket, step_ids

DEFAULT = Path(__file__).parent / "default"
CUE, RISK = 0, 1
"""Columns of the model's output."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the detector keeps of a request: its risk (a probability) and the bucket that risk falls into."""

    risk: float
    bucket: int


class Detector:
    """Scores steps; pure, so the same step under the same request has the same score in every process and batch."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._config = artifact.manifest.features
        self.version = artifact.manifest.version
        self.threshold = artifact.manifest.threshold

    @classmethod
    def load(cls, path: Path | None = None) -> Detector:
        """Load the detector in directory `path`, or the one shipped in the package. Errors: `Artifact.load`."""
        return cls(Artifact.load(path or DEFAULT, "detector"))

    def request(self, request: str) -> RequestContext:
        """Return the context that this request's steps are scored in; compute it once per request."""
        ids, weights = request_features(request, self._config)
        risk = float(self._artifact.run([ids], [weights])[0, RISK])
        if not np.isfinite(risk):
            risk = 1.0
        return RequestContext(risk, risk_bucket(risk, self._config))

    def score(self, ctx: RequestContext, steps: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the probability [n] that each of n steps is a cue, each scored by itself given the request.

        A step without words scores 0. A score that is not a number counts as 1: unreadable is not safe.
        """
        rows = [step_ids(step, ctx.bucket, self._config) for step in steps]
        if not rows:
            return np.zeros(0, np.float32)
        scores = self._artifact.run(rows)[:, CUE]
        scores = np.where(np.isfinite(scores), scores, np.float32(1))
        return np.where([bool(row) for row in rows], scores, np.float32(0)).astype(np.float32)
