"""Rates in the words of the overview: names of groups, bars of their course, what the sidecar has measured itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import Histogram
from sqlalchemy import func, select

from guard.sidecar.metrics import Metrics
from guard.store.store import Store
from guard.store.tables import traces

_HEIGHT = 56.0


@dataclass(frozen=True)
class Bar:
    """One span of the course, in units of the drawing: where it stands, how high all and the intervened are."""

    x: int
    all: float
    intervened: float
    requests: int
    with_intervention: int


def bars(course: list[tuple[int, int]]) -> list[Bar]:
    """The course as bars, the highest filling the drawing."""
    most = max((requests for requests, _ in course), default=0) or 1
    return [
        Bar(number, _HEIGHT * requests / most, _HEIGHT * intervened / most, requests, intervened)
        for number, (requests, intervened) in enumerate(course)
    ]


def name_of(by: str, key: tuple[str, ...], version_of: Callable[[str], str]) -> str:
    """A group's name."""
    if by == "version":
        return version_of(key[0])
    if by == "mode":
        return "shadow: decided, nothing forced" if key[0] == "True" else "enforced"
    return " ".join(key)


def first_day(store: Store, now: float) -> float:
    """When the oldest trace was written, a minute before now at the latest."""
    with store.reading() as connection:
        found = connection.execute(select(func.min(traces.c.created)).where(~traces.c.probe)).scalar()
    return min(float(found), now - 60) if found is not None else now - 60


def guard_time(spent: list[int]) -> Wait:
    """Quantiles of what requests waited for the guard, by nearest rank; `spent` in microseconds, the least first."""
    if not spent:
        return Wait("not recorded", "not recorded", 0)
    p50, p95 = (f"{spent[math.ceil(share * len(spent)) - 1] / 1000:.1f} ms" for share in (0.5, 0.95))
    return Wait(p50, p95, len(spent))


@dataclass(frozen=True)
class Wait:
    """A quantile of a histogram: at most so many seconds."""

    p50: str
    p95: str
    n: int


class Measured(NamedTuple):
    """What the sidecar has measured since it started."""

    outcomes: Counter[str]
    receipts: Wait
    steps: Wait
    """What a step waited to be judged."""


def measured(metrics: Metrics) -> Measured:
    """Requests by outcome, the wait for receipts, and the guard's time for a step."""
    outcomes: Counter[str] = Counter()
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == "reasonguard_requests_total":
                outcomes[sample.labels["result"]] += int(sample.value)
    return Measured(outcomes, _wait(metrics.receipt_wait), _wait(metrics.guard_step))


def _wait(histogram: Histogram) -> Wait:
    found = [
        (float(sample.labels["le"]), int(sample.value))
        for family in histogram.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
    n = found[-1][1]
    return Wait(_quantile(found, n, 0.5), _quantile(found, n, 0.95), n)


def _quantile(buckets: list[tuple[float, int]], n: int, share: float) -> str:
    """The bucket that holds it, in milliseconds: a histogram knows no more."""
    if n == 0:
        return "nothing yet"
    bound = next(bound for bound, count in buckets if count >= share * n)
    longest = buckets[-2][0]
    return f"over {1000 * longest:g} ms" if math.isinf(bound) else f"at most {1000 * bound:g} ms"
