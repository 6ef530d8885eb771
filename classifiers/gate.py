"""What a new detector must not be worse than before it takes a place: the shipped one, and the one that has the place.

Compared with the latter alone, quality could sink by less than is noticed at every retraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from classifiers.artifact import MANIFEST_FILE, fingerprint
from classifiers.build import score_encoded
from classifiers.compare import Difference, compare
from classifiers.corpus import Corpus
from classifiers.detector import DEFAULT, Detector
from classifiers.evaluate import frozen_part
from classifiers.measure import Scored


def holds_detector(directory: Path) -> bool:
    """Whether a directory has an artifact that can be lost."""
    return (directory / MANIFEST_FILE).exists()


def rivals(out: Path) -> list[Path]:
    """What a detector for `out` is compared with: the artifact that lies there, and the shipped one, if another."""
    found = [path for path in (out, DEFAULT) if holds_detector(path)]
    return found[:1] if len({fingerprint(path) for path in found}) < len(found) else found


def compare_paths(firsts: Sequence[Path], second: Path, corpus: Corpus) -> list[list[Difference]]:
    """Compare each of some artifacts with one other on the frozen test part."""
    new, scored = _scored(second, corpus)
    asked = float(new.manifest.training.get("fpr", 0.0))
    return [_compare(*_scored(first, corpus), new, scored, asked) for first in firsts]


def _scored(path: Path, corpus: Corpus) -> tuple[Detector, list[Scored]]:
    loaded = Detector.load(path)
    return loaded, score_encoded(loaded, frozen_part(path, loaded, corpus))


def _compare(
    old: Detector, first: Sequence[Scored], new: Detector, second: Sequence[Scored], asked: float
) -> list[Difference]:
    shared = {each.trace.id for each in first} & {each.trace.id for each in second}
    sides = [[each for each in side if each.trace.id in shared] for side in (first, second)]
    return compare(sides[0], sides[1], (old.threshold, new.threshold), asked)
