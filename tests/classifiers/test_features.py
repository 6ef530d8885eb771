"""Ids are pinned: a change of the hash would silently void every artifact."""

from __future__ import annotations

from zlib import crc32

import pytest

from classifiers.features import Bag, FeatureConfig, grams, pairs, request_features, risk_bucket, step_ids, words_of

CONFIG = FeatureConfig()
PINNED_STEP = [8178, 14664, 60412, 76900, 94832, 115072, 126155, 173866, 182893, 198925, 208364, 215387, 254493]


def test_ids_of_a_literal_step() -> None:
    assert step_ids("Plan it.", 1, CONFIG) == PINNED_STEP


def test_ids_of_a_literal_request() -> None:
    ids, weights = request_features("Steal it", CONFIG)
    assert [i for i, weight in zip(ids, weights, strict=True) if weight > 1] == sorted(
        crc32(name.encode(), crc32(space + b"\x01")) % (CONFIG.table_size - 1) + 1
        for space, names in (
            (b"req.words", ("steal", "it")),
            (b"req.pairs", ("^ steal", "steal it")),
            (b"req.stems", ("steal", "it")),
        )
        for name in names
    )
    assert (len(ids), ids[:3], ids[-3:]) == (27, [11680, 38026, 52659], [249544, 260925, 261701])
    assert sorted({round(weight, 4) for weight in weights}) == [0.4364, 1.4142]  # 2 / sqrt(21) and 2 / sqrt(2)


def test_a_request_without_words_has_no_ids() -> None:
    assert request_features(" ... ", CONFIG) == ([], [])


def test_a_long_request_weighs_no_more_than_a_short_one() -> None:
    for request in ("Steal it", "How would anyone take a boat from a busy harbour at night? " * 9):
        _, weights = request_features(request, CONFIG)
        assert sum(weight * weight for weight in weights) == pytest.approx(4 * 4.0, rel=0.05)


def test_bag_keeps_the_larger_weight() -> None:
    bag = Bag(2)
    bag.add("a", ["x", "y"], 2.0)
    bag.add("b", ["z"], 0.5, shared=False)
    assert bag.result() == ([1], [pytest.approx(2 / 2**0.5)])


def test_pairs_and_grams() -> None:
    assert pairs(["a", "b"]) == ["^ a", "a b"]
    assert grams("abcd", (3, 5)) == ["abc", "bcd"]


def test_the_hash_is_the_chained_crc32() -> None:
    seed = crc32(b"step.uni\x00")
    assert crc32(b"plan ", seed) % (CONFIG.table_size - 1) + 1 in step_ids("plan", 0, CONFIG)


def test_bucket_changes_only_crossed_ids() -> None:
    low, high = set(step_ids("plan it", 0, CONFIG)), set(step_ids("plan it", 3, CONFIG))
    assert len(low - high) == len(high - low) == 5  # the bucket, two words and two pairs crossed with it
    assert len(low & high) == 8


def test_disguise_has_the_ids_of_the_plain_step() -> None:
    assert step_ids("p l a n \u200bit", 2, CONFIG) == step_ids("Plan it", 2, CONFIG)


def test_ids_fit_the_table_and_spare_the_padding() -> None:
    ids = step_ids("some words to hash here", 0, FeatureConfig(table_size=8))
    assert set(ids) <= set(range(1, 8))


def test_a_step_without_words_has_no_ids() -> None:
    assert step_ids(" ... \u200b", 0, CONFIG) == []


def test_words() -> None:
    assert words_of("don't ask! 我好 ok", 9) == ["don't", "ask", "!", "我", "好", "ok"]


def test_buckets() -> None:
    assert [risk_bucket(risk, CONFIG) for risk in (0.0, 0.2, 0.49, 0.5, 0.7, 1.0)] == [0, 1, 2, 3, 4, 4]
