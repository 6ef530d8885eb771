"""A linear model over hashed ids, as onnxruntime runs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from classifiers.artifact import session
from classifiers.features import PADDING


class HashedModel:
    """Rows of ids to rows of probabilities; see `classifiers.export.build_graph`."""

    def __init__(self, payload: bytes, name: str) -> None:
        self._session = session(payload, name)
        self._weighted = any(each.name == "weights" for each in self._session.get_inputs())

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
