"""Intervals, against published values."""

from __future__ import annotations

import pytest

from classifiers.stats import Rate, bootstrap, bootstrap_pair, difference, ratio, wilson


def test_wilson_exact() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29.
    for k, n, lo, hi in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        rate, found_lo, found_hi = wilson(k, n)
        assert rate == k / n
        assert (round(found_lo, 4), round(found_hi, 4)) == (lo, hi)


def test_wilson_ends() -> None:
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
    assert wilson(5, 5)[2] == 1.0
    with pytest.raises(ValueError, match="6 successes in 5 trials"):
        wilson(6, 5)


def test_rate_prints_with_its_interval() -> None:
    assert str(Rate.of(81, 263)) == "0.308 [0.255, 0.366] n=263"


def test_bootstrap_holds_the_point_and_repeats() -> None:
    values = [0.0] * 30 + [1.0] * 10
    found = bootstrap(lambda x: float(x.mean()), values, seed=1)
    assert found.rate == 0.25
    assert found.n == 40
    assert (found.lo, found.hi) == (0.125, 0.4)
    assert found == bootstrap(lambda x: float(x.mean()), values, seed=1)


def test_bootstrap_pair() -> None:
    a, b = [1.0] * 8 + [0.0] * 2, [1.0] * 4 + [0.0] * 16
    assert bootstrap_pair(a, b, ratio).rate == pytest.approx(4.0)
    gap = bootstrap_pair(a, b, difference)
    assert gap.rate == pytest.approx(0.6)
    assert 0.2 < gap.lo < 0.6 < gap.hi < 0.95
    assert gap.n == 10
    with pytest.raises(ValueError, match="sizes 0 and 20"):
        bootstrap_pair([], b, ratio)
