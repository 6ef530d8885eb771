"""Ids are pinned: a change of the hash would silently void every artifact."""

from __future__ import annotations

from zlib import crc32

import pytest

from classifiers.features import Bag, FeatureConfig, grams, pairs, risk_bucket, step_ids, words_of

CONFIG = FeatureConfig()
PINNED_STEP = [8178, 14664, 76900, 115072, 126155, 173866, 215387, 254493]


def test_ids_of_a_literal_step() -> None:
    assert step_ids("Plan it.", CONFIG) == PINNED_STEP


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
    assert crc32(b"plan ", seed) % (CONFIG.table_size - 1) + 1 in step_ids("plan", CONFIG)


def test_disguise_has_the_ids_of_the_plain_step() -> None:
    assert step_ids("p l a n \u200bit", CONFIG) == step_ids("Plan it", CONFIG)


def test_ids_fit_the_table_and_spare_the_padding() -> None:
    ids = step_ids("some words to hash here", FeatureConfig(table_size=8))
    assert set(ids) <= set(range(1, 8))


def test_a_step_without_words_has_no_ids() -> None:
    assert step_ids(" ... \u200b", CONFIG) == []


def test_words() -> None:
    assert words_of("don't ask! 我好 ok", 9) == ["don't", "ask", "!", "我", "好", "ok"]


def test_buckets() -> None:
    assert [risk_bucket(risk, CONFIG) for risk in (0.0, 0.2, 0.49, 0.5, 0.7, 1.0)] == [0, 1, 2, 3, 4, 4]
