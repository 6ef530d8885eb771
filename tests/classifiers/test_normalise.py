"""The scorer's view."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.normalise import normalise


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        ("I  will\n\tPlan it", "i will plan it"),
        ("ste\u200bal\u00ad the b\u2060ike", "steal the bike"),
        ("\u0455t\u0435\u0430l", "steal"),
        ("\uff53\uff54\uff45\uff41\uff4c", "steal"),
        ("s t e a l it", "steal it"),
        ("s.t.e.a.l it", "steal it"),
        ("s-t-e-a-l", "steal"),
        ("a b cd", "a b cd"),
        ("i am a man", "i am a man"),
        ("I\u2019m \u201csure\u201d", 'i\'m "sure"'),
        ("s\u0336t\u0336e\u0336a\u0336l\u0336", "steal"),
        ("Stra\u00dfe f\u00fcr alle", "strasse f\u00fcr alle"),
        ("\U000e0041hello\ufe0f", "hello"),
        ("h4ck the 5erv3r", "hack the server"),
        ("1337 b0mb, 7h3 d00r", "1337 bomb, the door"),
        ("mp3 in 12kg, 2nd of covid19, b12", "mp3 in 12kg, 2nd of covid19, b12"),
        ("", ""),
    ],
)
def test_exact_views(raw: str, seen: str) -> None:
    assert normalise(raw) == seen


def test_length_is_bounded_even_where_a_character_expands() -> None:
    assert len(normalise("\ufdfa" * 5000, limit=100)) <= 100


@given(st.text(max_size=200))
def test_never_fails_and_never_grows_past_the_limit(text: str) -> None:
    assert len(normalise(text, limit=150)) <= 150


def test_hostile_runs_cost_linear_time() -> None:
    started = time.perf_counter()
    for text in ("a " * 10**6, "a-" * 10**6, " " * 10**6, "\u0336" * 10**6, "a1" * 10**6):
        normalise(text)
    assert time.perf_counter() - started < 0.5
