"""Rates with their 95 % intervals, and bootstrap intervals for what has no closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Z95 = 1.959963984540054


class Rate(BaseModel):
    """A share or a score with its 95 % interval and the number of cases behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float
    lo: float
    hi: float
    n: int

    @classmethod
    def of(cls, k: int, n: int) -> Self:
        """Return the share k of n with its Wilson interval."""
        rate, lo, hi = wilson(k, n)
        return cls(rate=rate, lo=lo, hi=hi, n=n)

    @classmethod
    def clustered(cls, flags: Sequence[bool], groups: Sequence[Hashable]) -> Self:
        """Return the share of true flags with an interval that knows which cases belong together.

        Wilson's interval at the effective number of cases: n over the design effect, which compares the variance of
        the share between groups to that of independent cases. Where all cases say the same nothing shows how they
        depend on each other: they count as one a group. With one case a group it is `of`. n is the number of cases.
        ValueError for unequal lengths.
        """
        if len(flags) != len(groups):
            raise ValueError(f"{len(flags)} flags and {len(groups)} groups; wanted one group a flag")
        k, n = sum(flags), len(flags)
        if n == 0:
            return cls.of(0, 0)
        rest: dict[Hashable, float] = {}
        for flag, group in zip(flags, groups, strict=True):
            rest[group] = rest.get(group, 0.0) + flag - k / n
        between = sum(value**2 for value in rest.values())
        effective = float(len(rest)) if k in (0, n) else k * (n - k) / between if between else math.inf
        share = min(float(n), effective) / n
        _, lo, hi = wilson(k * share, n * share)
        return cls(rate=k / n, lo=lo, hi=hi, n=n)

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.lo:.3f}, {self.hi:.3f}] n={self.n}"


def wilson(k: float, n: float, z: float = Z95) -> tuple[float, float, float]:
    """Return (rate, lo, hi) of k successes in n trials: Wilson's score interval.

    n = 0 gives (0, 0, 1): nothing is known. ValueError when k is not within 0 .. n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials cannot be; wanted 0 <= k <= n")
    if n == 0:
        return 0.0, 0.0, 1.0
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula is exact but its float rounding is not.
    return rate, (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def bootstrap(
    statistic: Callable[..., float],
    *columns: Sequence[float] | npt.NDArray[np.floating],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    times: int = 1000,
) -> Rate:
    """Return a statistic of row-aligned columns with its percentile interval over resampled rows.

    `groups`: of each row, what it belongs to; whole groups are resampled, so that rows of one group (wordings and
    seeds of one topic) count as one draw. Resamples on which the statistic is not finite (one class only, say) are
    left out. ValueError without rows.
    """
    arrays = [np.asarray(column) for column in columns]
    n = len(arrays[0])
    if n == 0:
        raise ValueError("a bootstrap interval needs at least one row")
    random = np.random.default_rng(seed)
    rows = None if groups is None else _rows_by_group(groups)

    def pick() -> npt.NDArray[np.intp]:
        if rows is None:
            return random.integers(0, n, n)
        return np.concatenate([rows[i] for i in random.integers(0, len(rows), len(rows))])

    picks = (pick() for _ in range(times))
    values = np.array([statistic(*(array[pick] for array in arrays)) for pick in picks])
    values = values[np.isfinite(values)]
    point = float(statistic(*arrays))
    lo, hi = np.percentile(values, [2.5, 97.5]) if len(values) else (point, point)
    return Rate(rate=point, lo=float(lo), hi=float(hi), n=n)


def _rows_by_group(groups: Sequence[Hashable]) -> list[npt.NDArray[np.intp]]:
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    return [np.array(rows) for rows in found.values()]


def bootstrap_pair(
    a: Sequence[float], b: Sequence[float], how: Callable[[float, float], float], *, seed: int = 0, times: int = 2000
) -> Rate:
    """Return how(mean(a), mean(b)) for two independent samples, such as `difference` or `ratio`, with its interval.

    n is the smaller sample's size. ValueError when a sample is empty.
    """
    if not len(a) or not len(b):
        raise ValueError(f"two samples are needed, got sizes {len(a)} and {len(b)}")
    left, right = np.asarray(a, float), np.asarray(b, float)
    random = np.random.default_rng(seed)
    values = [how(random.choice(left, len(left)).mean(), random.choice(right, len(right)).mean()) for _ in range(times)]
    finite = np.array(values)[np.isfinite(values)]
    point = float(how(left.mean(), right.mean()))
    lo, hi = np.percentile(finite, [2.5, 97.5]) if len(finite) else (point, point)
    return Rate(rate=point, lo=float(lo), hi=float(hi), n=min(len(left), len(right)))


def difference(a: float, b: float) -> float:
    """Return a - b."""
    return a - b


def ratio(a: float, b: float) -> float:
    """Return a / b, or infinity when b is 0."""
    return a / b if b else math.inf
