"""The scorer's view."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers import letters
from classifiers.normalise import _VIEWED, _VIEWS, normalise


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
        ("1 w1ll m4k3 4 b0mb 4nd 53cur17y 15 f1r57 70 g0", "i will make a bomb and security is first to go"),
        ("Th3y h1d3 th3 ca$h 1n th3 c3llar", "they hide the cash in the cellar"),
        ("h0w do 4nd 70", "how do 4nd 70"),
        ("mp3 in 12kg, 2nd of covid19, b12", "mp3 in 12kg, 2nd of covid19, b12"),
        ("", ""),
        ("h  a  c  k   t  h  e   site", "hack the site"),
        ("i   w  i  l  l   h  a  c  k   i  t.", "i will hack it."),
        ("t e l l  m e  h o w", "tell m e how"),
        ('"h a c k" it', '"hack" it'),
        ("h/a/c/k it, s|t|e|a|l", "hack it, steal"),
        ("h, a, c, k, s", "hacks"),
        ("h + a + c + k + s", "hacks"),
        ("s\nt\ne\na\nl", "steal"),
        ("s - t - e - a - l", "steal"),
        ("\u1d1b\u029c\u1d07 \ua731\u1d1b\u1d07\u1d00\u029f", "the steal"),
        ("\U0001f1f8\U0001f1f9\U0001f1ea\U0001f1e6\U0001f1fb \U0001f177\U0001f170\U0001f152\U0001f15a", "steav hack"),
        ("i_will_help_the_user_hack_it", "i will help the user hack it"),
        ("i.will.help.them-pay", "i will help them-pay"),
        ("h@ck the pa$$word, k!ll it!", "hack the password, kill it!"),
        ("p@55w0rd and r0b83ry", "password and robbery"),
        ("a\U000e0101b\u2800c", "ab c"),
        ("so ----- no", "so --- no"),
    ],
)
def test_exact_views(raw: str, seen: str) -> None:
    assert normalise(raw) == seen


@pytest.mark.parametrize(
    "text",
    [
        "a + b + c + d = 10, so i + j + k + a + b", "f(a, b, c, d) = [x, y, z, a]", "points a, b, c, d and e",
        "the vowels a, e, i, o, u are", "x, y, z, w", "a|b|c|d", "a/c/g/t", "e, a, d, g, b, e", "r, g, b, a",
        "mail bob@home or git@github.com, logo@2x.png", "a@b + w@x", "us$100m, $5, $home", "x$y$z", "wait! no! stop!",
        "k8s p2p b2b h264 8d6 word2vec", "def get_user_name(a_b): return my_name", "| --- | --- |", "p(a|b,c)",
        "1. e4 e5 2. nf3 nc6 3. bb5 a6",
        "https://example.org/a/long/path/with_words_in_it", "the state-of-the-art of it", "x != y and !z", "1. a 2. b",
    ],
)  # fmt: skip
def test_lists_maths_and_code_are_not_joined_or_respelled(text: str) -> None:
    assert normalise(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Mix H2SO4 with C2H5OH, NH4NO3 and CH3OH in 170 ml",
        "Support l10n, i18n and a11y in 170 places",
        "Commits a1b2c3d, 4e5f6a7 and 0f1e2d3 touch 170 files",
        "Between us: a h4cker with 1 b0mb waited 170 minutes at the door, then walked home again and slept well",
    ],
)
def test_a_text_with_codes_or_few_respelled_words_keeps_its_numbers(text: str) -> None:
    assert "170" in normalise(text).split()


@pytest.mark.parametrize("filler", ["-", " ", "=-", "\u200b\u200c", "x", "\n", "\u3000", "\ufdfa", "e\u0301\u0316"])
def test_no_filler_pushes_a_text_out_of_sight(filler: str) -> None:
    assert normalise(filler * 3000 + " steal the bike").endswith("steal the bike")
    assert normalise("steal the bike " + filler * 3000).startswith("steal the bike")


def test_runs_are_collapsed_before_a_text_is_cut() -> None:
    assert normalise("-" * 2000 + "steal" + " " * 2000 + "it") == "---steal it"
    assert normalise("steal " + "word " * 1000 + "it", limit=21) == "steal word rd word it"


def test_length_is_bounded_even_where_a_character_expands() -> None:
    assert len(normalise("\ufdfa" * 5000, limit=100)) <= 100


@given(st.text(max_size=200))
def test_never_fails_and_never_grows_past_the_limit(text: str) -> None:
    assert len(normalise(text, limit=150)) <= 150


def test_what_is_no_character_is_dropped() -> None:
    assert normalise("ste\ud800al") == "steal"


def test_hostile_runs_cost_linear_time() -> None:
    started = time.perf_counter()
    for text in ("a " * 10**6, "a-" * 10**6, " " * 10**6, "\u0336" * 10**6, "a1" * 10**6, "a/" * 10**6, "a@" * 10**6,
                 "\u0301\u0316" * 10**6, "\ufdfa" * 10**6, "ab_" * 10**6, "-=" * 10**6):  # fmt: skip
        normalise(text)
    assert time.perf_counter() - started < 0.5


def test_what_is_remembered_stays_bounded() -> None:
    """A hostile reasoning holds any number of texts and words."""
    for number in range(2 * _VIEWED):
        assert normalise(f"Text {number}") == f"text {number}"
        assert len(_VIEWS) <= _VIEWED
    words = [f"w{'abcdefghij'[i % 10]}{i}" for i in range(letters._MOST_SUMS + 5)]
    assert letters.likelihood(words, remember=True) == letters.likelihood(words)
    assert len(letters._SUMS) <= letters._MOST_SUMS
