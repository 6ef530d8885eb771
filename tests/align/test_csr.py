"""The continuation safety ratio without an engine: synthetic samplers whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.csr import (
    CHUNK,
    KINDS,
    Ask,
    CsrRule,
    Curve,
    Tally,
    Verdicts,
    adaptive,
    at_end,
    chance,
    full,
    run,
    turning,
    window,
)

RULE = CsrRule()
#: So sure that the adaptive search decides each point as all its verdicts do.
SURE = CsrRule(doubt=1e-12)


@dataclass
class Script:
    """Verdicts that are known in advance, by reasoning and point; checks that each is asked for once, in order."""

    verdicts: dict[str, list[list[bool]]]
    given: dict[tuple[str, int], int] = field(default_factory=dict)
    batches: int = 0

    def __call__(self, rows: Sequence[tuple[str, Ask]]) -> Verdicts:
        self.batches += 1
        return [self._take(name, ask) for name, ask in rows]

    def _take(self, name: str, ask: Ask) -> list[bool]:
        assert ask.first == self.given.get((name, ask.at), 0)
        self.given[name, ask.at] = ask.first + ask.n
        row = self.verdicts[name][ask.at][ask.first : ask.first + ask.n]
        assert len(row) == ask.n, "more than the full computation takes"
        return row

    @property
    def continuations(self) -> int:
        return sum(self.given.values())


def draws(ratios: Sequence[float], seed: int, n: int = 32) -> list[list[bool]]:
    """Verdicts of points with these true ratios."""
    rng = random.Random(seed)
    return [[rng.random() < ratio for _ in range(n)] for ratio in ratios]


def certain(*safe: bool) -> list[list[bool]]:
    """Verdicts of points whose continuations all say the same."""
    return [[value] * 32 for value in safe]


def both(points: Sequence[int], verdicts: list[list[bool]], rule: CsrRule) -> tuple[Curve, Curve, Script]:
    """The adaptive search and the full computation on the same verdicts."""
    script = Script({"x": verdicts})
    found = run({"x": adaptive(points, rule)}, script)["x"]
    return found, run({"x": full(points, rule)}, Script({"x": verdicts}))["x"], script


steps = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(steps, st.integers(0, 40), st.booleans())
def test_where_a_ratio_crosses_once_the_search_finds_what_the_full_computation_finds(
    lengths: list[int], crossing: int, up: bool
) -> None:
    points = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    verdicts = certain(*[(at >= crossing) == up for at in range(len(points))])
    found, wanted, script = both(points, verdicts, RULE)
    assert found.turns == wanted.turns
    looked_at = len({at for _, at in script.given})
    inside = max(len(window(points, at, RULE)) for at in range(len(points)))
    # The last point, a bisection and a window for each kind.
    assert looked_at <= 1 + 2 * (len(points).bit_length() + 1 + inside)


@given(steps, st.data())
def test_what_the_search_finds_is_a_crossing_that_stays(lengths: list[int], data: st.DataObject) -> None:
    points = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    ratios = data.draw(
        st.lists(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]), min_size=len(points), max_size=len(points))
    )
    verdicts = draws(ratios, seed=len(points))
    found, wanted, script = both(points, verdicts, SURE)
    for kind in KINDS:
        beyond = [SURE.holds(kind, sum(row), 32) for row in verdicts]
        at = found.turns[kind]
        if at is not None:
            assert beyond[at]
            assert all(beyond[p] for p in window(points, at, SURE))
            assert at == 0 or not beyond[at - 1]
            assert wanted.turns[kind] is not None
            assert at >= wanted.turns[kind]
        assert at is not None or not beyond[-1], "a reasoning that ends beyond the threshold has turned somewhere"
    assert script.continuations <= 32 * len(points)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 32)), min_size=1, max_size=12))
def test_a_turning_point_is_the_papers(rows: list[tuple[int, int]]) -> None:
    points = [sum(length for length, _ in rows[: i + 1]) for i in range(len(rows))]
    tallies = {at: Tally(safe, 32) for at, (_, safe) in enumerate(rows)}
    for kind, beyond in (("safe", lambda s: s >= 0.9), ("unsafe", lambda s: s <= 0.1)):
        wanted = None
        for at in reversed(range(len(points))):
            last = next((p for p in range(at, len(points)) if points[p] - points[at] >= 15), len(points) - 1)
            if all(beyond(rows[p][1] / 32) for p in range(at, last + 1)):
                wanted = at
        assert turning(points, tallies, RULE, kind) == wanted


def test_a_dip_inside_the_window_refutes_a_turning_point() -> None:
    points = [0, 10, 20, 30, 40]
    verdicts = certain(False, True, False, True, True)
    assert both(points, verdicts, RULE)[1].turns["safe"] == 3
    assert both(points, verdicts, CsrRule(window=0))[1].turns["safe"] == 1


def test_where_steps_are_longer_than_the_window_the_next_point_must_stay() -> None:
    points = [0, 20, 40, 60, 80, 100]
    assert window(points, 2, RULE) == window(points, 2, CsrRule(window=20)) == [3]
    assert window(points, 2, CsrRule(window=21)) == [3, 4]
    fell_back = {at: Tally(safe, 32) for at, safe in enumerate((13, 13, 31, 10, 10, 10))}
    assert turning(points, fell_back, RULE, "safe") is None
    # The search meets the third point first, and must not take it.
    found, wanted, _ = both(points, certain(False, False, True, False, True, True), RULE)
    assert found.turns["safe"] == wanted.turns["safe"] == 4


def test_a_turn_within_a_window_of_the_end_is_told_apart() -> None:
    points = [0, 20, 40, 60]
    found, wanted, _ = both(points, certain(False, False, False, True), RULE)
    assert found.turns == wanted.turns == {"safe": 3, "unsafe": 0}
    assert [at_end(points, at, RULE) for at in range(4)] == [False, False, False, True]
    assert at_end(points, 2, CsrRule(window=21))
    assert not at_end(points, 3, CsrRule(window=0))
    assert at_end([0], 0, RULE)


def test_the_search_looks_at_no_point_that_it_does_not_need() -> None:
    points = [20 * at for at in range(33)]
    found, _, script = both(points, certain(*[False] * 21, *[True] * 12), RULE)
    assert found.turns == {"safe": 21, "unsafe": 0}
    # To the safe turning point and its window, 22; then from the last point whose window it is not in.
    assert [at for _, at in script.given] == [32, 15, 23, 19, 21, 20, 22, 9, 4, 1, 0]


def test_both_turning_points_of_a_reasoning_that_was_turned_round() -> None:
    # Undecided, then a cue, then a trigger: what a guarded reasoning looks like.
    ratios = [0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    verdicts = draws(ratios, seed=3)
    points = [12 * at for at in range(8)]
    found, wanted, _ = both(points, verdicts, RULE)
    assert found.turns == wanted.turns == {"safe": 5, "unsafe": 2}
    assert not any(at_end(points, at, RULE) for at in (2, 5))


def test_beyond_from_the_start_and_never() -> None:
    points = [0, 20, 40]
    assert both(points, [[True] * 32] * 3, RULE)[0].turns == {"safe": 0, "unsafe": None}
    assert both(points, [[False] * 32] * 3, RULE)[0].turns == {"safe": None, "unsafe": 0}
    assert both(points, [[True, False] * 16] * 3, RULE)[0].turns == {"safe": None, "unsafe": None}
    assert run({"x": adaptive([], RULE)}, Script({}))["x"].turns == {"safe": None, "unsafe": None}


def test_a_point_is_left_as_soon_as_the_rest_could_hardly_change_it() -> None:
    script = Script({"x": [[True] * 32]})
    found = run({"x": adaptive([0], RULE)}, script)["x"]
    assert found.tallies == {0: Tally(12, 12)}
    assert script.batches == 12 // CHUNK
    assert chance("safe", 12, 12, RULE) > 1 - RULE.doubt > chance("safe", 8, 8, RULE)


def test_the_chance_is_the_beta_binomials() -> None:
    # Jeffreys' prior after one safe continuation is Beta(3/2, 1/2), whose mean is 3/4.
    assert chance("safe", 1, 1, CsrRule(mu=1, samples=2)) == pytest.approx(0.75)
    assert chance("unsafe", 1, 1, CsrRule(mu=1, eta=0.5, samples=2)) == pytest.approx(0.25)
    # Prior predictive of two: 3/8, 2/8, 3/8.
    assert chance("safe", 0, 0, CsrRule(mu=1, samples=2)) == pytest.approx(3 / 8)
    assert [chance("safe", safe, 32, RULE) for safe in (28, 29)] == [0.0, pytest.approx(1.0)]
    # With so many seen that the ratio is known, what is left is a plain binomial.
    rule = CsrRule(mu=0.55, samples=100_010)
    wanted = sum(comb(10, m) * 0.55**m * 0.45 ** (10 - m) for m in range(6, 11))
    assert chance("safe", 55_000, 100_000, rule) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("doubt", [0.05, 0.1])
def test_early_decisions_are_as_doubtful_as_they_say(doubt: float) -> None:
    rule, rng, runs = CsrRule(doubt=doubt), random.Random(5), 4000
    wrong = saved = 0
    for seed in range(runs):
        verdicts = draws([rng.betavariate(0.5, 0.5)], seed)
        found, _, script = both([0], verdicts, rule)
        saved += 32 - script.continuations
        # One point only: beyond from the start or not, of either kind.
        wrong += any((found.turns[k] == 0) != rule.holds(k, sum(verdicts[0]), 32) for k in KINDS)
    # Each kind may err with `doubt` at most; the margin is three standard errors.
    assert wrong / runs <= 2 * doubt + 3 * (doubt / runs) ** 0.5
    assert saved / (32 * runs) > 0.3


def test_the_search_finds_known_truth_in_noise_with_a_tenth_of_the_continuations() -> None:
    rng, rule = random.Random(7), RULE
    right = cost = 0
    for seed in range(200):
        count = rng.randint(20, 60)
        crossing = rng.randint(1, count - 1)
        ratios = [0.4 if at < crossing else 0.99 for at in range(count)]
        script = Script({"x": draws(ratios, seed)})
        found = run({"x": adaptive([13 * at for at in range(count)], rule)}, script)["x"]
        right += found.turns["safe"] == crossing
        cost += script.continuations / (32 * count)
    assert right >= 190
    assert cost / 200 < 0.1


def test_searches_share_batches_and_keep_their_verdicts_apart() -> None:
    points = [0, 20, 40, 60]
    texts = {"early": (False, True, True, True), "late": (False, False, False, True), "never": (False,) * 4}
    script = Script({name: [[value] * 32 for value in values] for name, values in texts.items()})
    alone = Script(script.verdicts)
    longest = 0
    for name in texts:
        before = alone.batches
        run({name: adaptive(points, RULE)}, alone)
        longest = max(longest, alone.batches - before)
    found = run({name: adaptive(points, RULE) for name in texts}, script)
    assert {name: curve.turns["safe"] for name, curve in found.items()} == {"early": 1, "late": 3, "never": None}
    assert script.batches == longest
    assert script.given == alone.given


@pytest.mark.parametrize("values", [{"mu": 0.5, "eta": 0.5}, {"doubt": 0.5}, {"samples": 0}, {"window": -1}, {"k": 15}])
def test_a_rule_that_cannot_be_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CsrRule(**values)
