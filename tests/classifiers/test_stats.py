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


def test_one_case_a_group_is_wilsons_interval() -> None:
    assert Rate.clustered([True] * 81 + [False] * 182, range(263)) == Rate.of(81, 263)
    assert Rate.clustered([], []) == Rate.of(0, 0)
    with pytest.raises(ValueError, match="1 flags and 2 groups"):
        Rate.clustered([True], ["a", "b"])


def test_repeats_of_a_topic_add_cases_and_no_certainty() -> None:
    topics = [f"t{i}" for i in range(20)]
    flags = [i < 5 for i in range(20)]
    once = Rate.clustered(flags, topics)
    # Every topic six times over, always with the same result: the interval of twenty cases, not of 120.
    often = Rate.clustered(flags * 6, topics * 6)
    assert (often.rate, often.n) == (0.25, 120)
    assert (often.lo, often.hi) == pytest.approx((once.lo, once.hi))
    assert Rate.clustered([False] * 120, topics * 6).hi == pytest.approx(Rate.of(0, 20).hi)
    # Wordings that differ within a topic as much as topics do are worth more than one case, never more than n.
    mixed = Rate.clustered([i % 2 == 0 for i in range(40)], [i // 2 for i in range(40)])
    assert (mixed.lo, mixed.hi) == (Rate.of(20, 40).lo, Rate.of(20, 40).hi)


def test_bootstrap_resamples_whole_groups() -> None:
    values = [0.0] * 30 + [1.0] * 10
    mean = lambda x: float(x.mean())  # noqa: E731
    alone = bootstrap(mean, values)
    assert bootstrap(mean, values, groups=range(40)) == alone
    repeated = bootstrap(mean, values * 3, groups=[*range(40)] * 3)
    assert (repeated.rate, repeated.n) == (0.25, 120)
    assert (repeated.lo, repeated.hi) == (alone.lo, alone.hi)
    assert bootstrap(mean, values * 3).hi < repeated.hi
