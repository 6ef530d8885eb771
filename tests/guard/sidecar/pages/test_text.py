"""Hostile text made safe to show."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.sidecar.pages.text import plain, visible


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("{{7*7}} & 'a' \"b\"", "{{7*7}} &amp; &#39;a&#39; &#34;b&#34;"),
        ("a\nb\tc", 'a\nb<span class="hidden" title="control character">U+0009</span>c'),
        ("x\u202ey", 'x<span class="hidden" title="right-to-left override">U+202E</span>y'),
        ("\0", '<span class="hidden" title="control character">U+0000</span>'),
        ("\ud800", '<span class="hidden" title="control character">U+D800</span>'),
        ("\u200b", '<span class="hidden" title="zero width space">U+200B</span>'),
        ("\U000e0041", '<span class="hidden" title="tag latin capital letter a">U+E0041</span>'),
        ("שלום 这样", "שלום 这样"),
        ("e\u0301", "e\u0301"),
    ],
)
def test_what_hides_is_shown_and_what_acts_is_escaped(text: str, html: str) -> None:
    assert visible(text) == html


def test_stacked_marks_are_counted_out() -> None:
    assert visible("e" + "\u0301" * 6).count("U+0301") == 2


def test_a_long_text_is_bounded_and_says_so() -> None:
    shown = visible("ab" * 500_000, 100)
    assert shown.startswith("ab" * 50 + "<span")
    assert "… 999,900 more characters, not shown" in shown
    assert len(shown) < 300
    assert plain("a" * 1_000_000, 10) == "a" * 10 + "…"
    assert plain(" a \n b\u202e\0 ", 50) == "a b<U+202E><U+0000>"


class _Reader(HTMLParser):
    """The text that a browser would show, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"class", "title"}

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(max_size=80))
def test_no_text_becomes_markup(text: str) -> None:
    reader = _Reader()
    reader.feed(visible(text))
    reader.close()
    assert reader.tags <= {"span"}
    assert not any(0x202A <= ord(c) <= 0x202E or c == "\0" for c in reader.text)
    visible(text).encode()
