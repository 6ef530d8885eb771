from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from classifiers.detector import Detector
from classifiers.encoder import MAX_TOKENS
from classifiers.windows import MOST_CHARS, sentences, windows, within

SHIPPED = Detector.load()
units = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), max_size=30)


@given(units, st.integers(2, 60))
def test_every_id_stands_in_a_window_in_order_and_no_window_is_too_long(rows: list[list[int]], span: int) -> None:
    flat = [(number, at) for number, row in enumerate(rows) for at in range(len(row))]
    marked = iter(range(len(flat)))
    found = windows([[next(marked) for _ in row] for row in rows], span)
    assert all(0 < len(each) <= span for each in found)
    assert all(each == list(range(each[0], each[-1] + 1)) for each in found)
    assert sorted({i for each in found for i in each}) == list(range(len(flat)))
    assert all(a[0] < b[0] <= a[-1] + 1 for a, b in itertools.pairwise(found))


def test_neighbours_that_fit_stand_together_in_a_window() -> None:
    rows = [[1] * 12, [2] * 14, [3] * 9, [4] * 20, [5] * 15, [6] * 18]
    assert windows(rows, 40) == [
        [1] * 12 + [2] * 14 + [3] * 9,
        [2] * 14 + [3] * 9,
        [3] * 9 + [4] * 20,
        [4] * 20 + [5] * 15,
        [5] * 15 + [6] * 18,
    ]


def test_of_many_windows_the_first_few_and_the_last_are_read() -> None:
    assert within(range(20), 16) == [0, 1, 2, 3, *range(8, 20)]
    assert within(range(16), 16) == list(range(16))
    assert within(range(5), 2) == [0, 4]


def test_sentences_end_where_they_end_in_any_script() -> None:
    text = "One. Two! 3.14 is a number\n\n你好。再见。Last"
    assert list(sentences(text)) == ["One.", "Two!", "3.14 is a number", "你好。", "再见。", "Last"]


def test_of_a_text_without_end_beginning_and_end_are_read() -> None:
    text = "a" * 7_999 + "." + " b" * 40_000 + " end."
    found = "".join(sentences(text))
    assert len(found) <= MOST_CHARS
    assert found.startswith("aaa")
    assert found.endswith("end.")


def test_the_encoder_reads_a_short_text_whole_and_a_long_one_in_windows() -> None:
    encoder = SHIPPED.encoder
    (whole,) = encoder.windows("How do I bake bread?")
    assert encoder.vector(whole).tolist() == encoder.embed("How do I bake bread?").tolist()
    assert [encoder.text(ids) for ids in encoder.windows("")] == [""]
    assert len(encoder.windows(" " * 5000)) == 1
    found = encoder.windows("How do I bake bread? " * 30)
    assert len(found) > 5
    opening, closing = found[0][0], found[0][-1]
    assert all(each[0] == opening and each[-1] == closing and len(each) <= MAX_TOKENS for each in found)
