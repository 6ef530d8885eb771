"""The detector as the guard runs it: how much a step shows intent to comply, given the request and the step before.

Two tiers. The first, hashed and linear, clears steps that are no cue whatever the request; the encoder reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from classifiers.artifact import Manifest, file_of, load_files, session
from classifiers.clauses import Ranked, of_long, rank
from classifiers.encoder import Encoder, Vector
from classifiers.features import REQUEST_FEATURES, risk_bucket, step_ids
from classifiers.gloss import Glossaries
from classifiers.hashed import HashedModel
from classifiers.normalise import normalise
from classifiers.windows import MOST, within
from guard.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT = Path(__file__).parent / "default"
ENCODER_FILE, HEAD_FILE, FIRST_FILE, TOKENIZER_FILE = "encoder.onnx", "head.onnx", "first.onnx", "tokenizer.json"
GLOSSARY_FILE = "glossary.tsv.gz"
REQUEST_FILE = "request.onnx"
"""What ranks the windows of a long prompt; an artifact without it reads the first and the last."""
REPLAY_FILE = "replay.npz"
"""For training only: vectors of the public labelled traces."""
_LAST = 4
"""Windows at a prompt's end that are always read."""
CUE, RISK = 0, 1
"""Columns of the head's output."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the detector keeps of a request: its vector, its risk (a probability) and the bucket of that risk."""

    vector: Vector
    risk: float
    bucket: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One step to score: the request's context, the step, the step before it (empty for the first)."""

    context: RequestContext
    step: str
    previous: str


def view_of(files: Mapping[str, bytes]) -> Callable[[str], str]:
    """What an artifact's scorer sees of a text; UserError when its glossaries are malformed."""
    if GLOSSARY_FILE not in files:
        return normalise
    try:
        return Glossaries.read(files[GLOSSARY_FILE]).view
    except ValueError as error:
        raise UserError(
            f"{GLOSSARY_FILE} is malformed", got=str(error), wanted="language, form, English a line"
        ) from None


class Detector:
    """Scores steps; pure, so the same steps under the same request have the same scores in every process."""

    def __init__(self, manifest: Manifest, files: dict[str, bytes], path: Path, workers: int = 1) -> None:
        self._pool = ThreadPoolExecutor(workers, "encoder") if workers > 1 else None
        self.manifest = manifest
        self.version = manifest.version
        self.threshold = manifest.threshold
        self._view = view_of(files)
        self.encoder = Encoder(
            file_of(files, ENCODER_FILE, path), file_of(files, TOKENIZER_FILE, path), str(path / ENCODER_FILE),
            self._view,
        )  # fmt: skip
        self._head = session(file_of(files, HEAD_FILE, path), str(path / HEAD_FILE))
        self._first = HashedModel(file_of(files, FIRST_FILE, path), str(path / FIRST_FILE))
        ranks = files.get(REQUEST_FILE)
        self._ranks = None if ranks is None else HashedModel(ranks, str(path / REQUEST_FILE))

    @classmethod
    def load(cls, path: Path | None = None, workers: int = 1) -> Detector:
        """Load the detector in directory `path`, or the one shipped in the package. Errors: `load_files`.

        `workers`: threads among which the encoder's texts of one call are shared out. Each text is still encoded by
        itself on one of them, so their number changes no score.
        """
        path = path or DEFAULT
        return cls(*load_files(path, "detector"), path, workers)

    def request(self, *messages: str) -> RequestContext:
        """Return the context that a request's steps are scored in; compute it once per request.

        `messages` are all that the model was given, oldest first (`guard.prompt.PromptReader.messages`). The riskiest
        of them counts, and of a long one the riskiest window: otherwise who asks could choose what the steps are
        measured by.
        """
        return max(self._contexts(messages or ("",)), key=lambda context: context.risk)

    def _contexts(self, messages: Sequence[str]) -> Iterator[RequestContext]:
        for vector in self._each(self.encoder.vector, self._read(messages)):
            risk = float(self._run_head(vector, np.zeros_like(vector), vector)[RISK])
            if not np.isfinite(risk):
                risk = 1.0
            yield RequestContext(vector, risk, risk_bucket(risk, self.manifest.features))

    def _read(self, messages: Sequence[str]) -> list[list[int]]:
        """The windows that are read of all messages: of many the last few, and those whose words are the riskiest."""
        found = [ids for message in messages for ids in self.encoder.windows(message)]
        if self._ranks is None or len(found) <= MOST:
            return within(found, MOST)
        words = [step_ids(self.encoder.text(ids), REQUEST_FEATURES, str) for ids in found[:-_LAST]]
        ranks = self._ranks.run(words)[:, 0]
        chosen = sorted(np.argsort(-ranks, kind="stable")[: MOST - _LAST].tolist())
        return [*(found[i] for i in chosen), *found[-_LAST:]]

    def score(
        self, context: RequestContext, steps: Sequence[str], previous: str = "", *, first_tier: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return the probability [n] that each of n consecutive steps is a cue; `previous` came before the first.

        See `score_batch`; `first_tier=False` encodes every step.
        """
        before = [previous, *steps]
        return self.score_batch([Asked(context, step, last) for last, step in zip(before, steps, strict=False)],
                                first_tier=first_tier)  # fmt: skip

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        """Return the probability [n] that each of n steps of any requests is a cue; no step's score hangs on another's.

        A step without words scores 0. A score that is not a number counts as 1: unreadable is not safe. The first tier
        reads all steps at once; those that it clears have the manifest's score for such steps.
        """
        ranked = self._rank([(each.step, each.context) for each in asked])
        scores = [self._cleared(a, r, first_tier) for a, r in zip(asked, ranked, strict=True)]
        left = [i for i, score in enumerate(scores) if score is None]
        encoded = self._each(lambda i: self._encoded(asked[i], ranked[i]), left)
        return np.array([next(encoded) if score is None else score for score in scores], np.float32)

    def first_tier(self, steps: Sequence[str], context: RequestContext | None = None) -> list[float | None]:
        """Return the first tier's probability of each step; None for a step without words.

        Under a request that may be harmful (`context`) that of its riskiest clause, where it is higher.
        """
        return [each.highest for each in self._rank([(step, context) for step in steps])]

    def _rank(self, steps: Sequence[tuple[str, RequestContext | None]]) -> list[Ranked]:
        # Under a request of low risk clauses found nothing on the validation part: ordinary requests pay for none.
        parted = [(step, context is not None and context.bucket > 0) for step, context in steps]
        return rank(parted, self._first, self.manifest.features, self._view)

    def score_vectors(
        self, request: Vector, steps: npt.NDArray[np.float32], previous: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the scores [n] of steps whose vectors [n, width] are known; the first tier has no say."""
        pairs = zip(steps, previous, strict=True)
        return np.array([self._run_head(step, last, request)[CUE] for step, last in pairs], np.float32)

    def _each(self, call: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The results in the items' order, from as many threads as there are."""
        return map(call, items) if self._pool is None or len(items) < 2 else self._pool.map(call, items)

    def _cleared(self, asked: Asked, ranked: Ranked, first_tier: bool) -> float | None:
        """The score of a step that the encoder need not read; None: it must."""
        bucket = asked.context.bucket
        if ranked.highest is None:
            return 0.0
        clears = first_tier and ranked.highest < self.manifest.clear_below[bucket]
        return self.manifest.cleared_score[bucket] if clears else None

    def _encoded(self, asked: Asked, ranked: Ranked) -> float:
        step = self.encoder.embed(asked.step)
        last = self.encoder.embed(asked.previous) if asked.previous else np.zeros_like(step)
        # What a long step says in its middle counts as well, and what a clause says beside others.
        read = (step, *of_long(self.encoder, asked.step), *map(self.encoder.embed_view, ranked.clauses))
        scores = [float(self._run_head(each, last, asked.context.vector)[CUE]) for each in read]
        return max(scores) if all(map(np.isfinite, scores)) else 1.0

    def _run_head(self, step: Vector, previous: Vector, request: Vector) -> npt.NDArray[np.float32]:
        feed = {"step": step[None], "previous": previous[None], "request": request[None]}
        (scores,) = self._head.run(["scores"], feed)
        return np.asarray(scores[0], np.float32)
