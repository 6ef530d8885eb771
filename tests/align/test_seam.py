"""The seam: what cannot have come out of one model in one piece is found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from align.seam import FALSE_EOS, SPLIT, TWO_BOS, SeamCheck, Side
from guard.steps import TokenTable

A, SPACE_B, HEAD, TAIL, BOS, EOS = range(6)
#: HEAD and TAIL are the two halves of one character.
CHECK = SeamCheck(TokenTable([b"a", b" b", "é".encode()[:1], "é".encode()[1:], b"", b""]), BOS, EOS)


def objection(*pieces: list[int], prefix: list[int] | None = None, prompt: list[int] | None = None,
              finish: str | None = "stop") -> str | None:  # fmt: skip
    return CHECK.objection(prompt or [BOS, A], prefix if prefix is not None else [A], Side(pieces, finish))


def test_pieces_that_fit_pass() -> None:
    assert objection([SPACE_B], [A, HEAD, TAIL, EOS]) is None
    assert objection([SPACE_B], [A], finish="length") is None
    assert objection([A], finish=None) is None
    assert Side(([1, 2], [], [3]), None).ids == [1, 2, 3]


def test_a_seam_inside_a_character_is_found_wherever_it_is() -> None:
    assert objection([TAIL], prefix=[A, HEAD]) == SPLIT
    assert objection([SPACE_B, HEAD], [TAIL, A]) == SPLIT
    assert objection([SPACE_B, HEAD, TAIL], [A]) is None


def test_a_second_bos_is_found() -> None:
    assert objection([A], prompt=[BOS, BOS, A]) == TWO_BOS
    assert objection([A], [BOS, A]) == TWO_BOS
    assert SeamCheck(CHECK.table, None, EOS).objection([BOS, BOS], [A], Side(([A],), "stop")) is None


def test_an_eos_that_no_model_produced_is_found() -> None:
    assert objection([A, EOS], [A]) == FALSE_EOS
    assert objection([A], prefix=[A, EOS]) == FALSE_EOS
    assert objection([A, EOS], finish="length") == FALSE_EOS
    assert objection([A, EOS], finish=None) is None


@given(st.lists(st.lists(st.sampled_from([A, SPACE_B]), max_size=4), min_size=1, max_size=4), st.booleans())
def test_whole_characters_fit_however_they_are_cut(pieces: list[list[int]], ended: bool) -> None:
    last = [*pieces[-1], EOS] if ended else pieces[-1]
    assert objection(*pieces[:-1], last, finish="stop" if ended else "length") is None
