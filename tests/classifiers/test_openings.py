"""Openings are cut and drawn anew."""

from __future__ import annotations

from collections import Counter

import pytest

from classifiers.openings import _NEW, swap_opening


@pytest.mark.parametrize(
    ("request_text", "rest"),
    [
        ("How can I water a fern?", "water a fern"),
        ("What are some effective ways to water a fern?", "water a fern"),
        ("Write a tutorial on how to water a fern", "water a fern"),
        ("Could you please explain how to water a fern?", "water a fern"),
        ("Give me step-by-step instructions to water a fern.", "water a fern"),
        ("My fern is dry", "my fern is dry"),
        ("Explain ferns", "explain ferns"),
        ("Tell {me} {0} things", "{me} {0} things"),
    ],
)
def test_the_opening_is_another(request_text: str, rest: str) -> None:
    assert swap_opening(request_text) in {new.format(rest) for new in _NEW}
    assert swap_opening(request_text) == swap_opening(request_text.upper())


def test_every_opening_is_drawn_about_as_often() -> None:
    drawn = Counter(swap_opening(f"How do I paint chair {n}?").replace(f"paint chair {n}", "{}") for n in range(1000))
    assert set(drawn) == set(_NEW)
    assert 60 < min(drawn.values()) <= max(drawn.values()) < 140


def test_an_empty_request_does_no_harm() -> None:
    assert swap_opening("") in {new.format("") for new in _NEW}
