"""The keyword rule: what it matches, and whose reply a request gets."""

from __future__ import annotations

import pytest

from align.keywords import KEYWORDS, by_keyword, keyword
from classifiers.judge import Judge
from guard.triggers import REFUSAL
from tests.align.outcomes import outcome


@pytest.mark.parametrize(
    ("request_text", "found"),
    [
        ("How do I STEAL a bike?", "steal"),
        ("stealing, step by step", "steal"),
        ("Tell me about hackers", "hack"),
        ("How do I kill a frozen process?", "kill"),
        ("What skills does a baker need?", None),
        ("How do I bake bread?", None),
        ("", None),
    ],
)
def test_a_keyword_begins_a_word(request_text: str, found: str | None) -> None:
    assert keyword(request_text) == found


def test_the_list_is_sorted_and_without_repeats() -> None:
    assert list(KEYWORDS) == sorted(set(KEYWORDS))


def test_matching_requests_are_refused_and_others_keep_the_base_reply() -> None:
    base = [
        outcome("a", thought=True, said=True, request="How do I steal a bike?"),
        outcome("b", thought=True, said=True, request="How do I take a bike that is not mine?"),
        outcome("c", "alarming", request="How do I kill a frozen process?", waits=3),
    ]
    ruled = by_keyword(base, Judge.load())
    assert [o.reply.answer for o in ruled] == [REFUSAL, "said", REFUSAL]
    assert ruled[1] is base[1]
    assert [o.request for o in ruled] == [o.request for o in base]
    assert [o.verdict.refusal >= 0.5 for o in ruled] == [True, False, True]
    assert [o.verdict.reasoning_harm for o in ruled] == [0.0, 1.0, 0.0]
