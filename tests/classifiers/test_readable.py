"""What cannot be read, and what only looks odd."""

from __future__ import annotations

import base64
import codecs
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.corpus import part_of
from classifiers.labels import read_authored
from classifiers.readable import TABLE, count_pairs, unreadable

PLAIN = "First I will work out what the plan needs and who could help with it."


@pytest.mark.parametrize(
    "hidden",
    [
        codecs.encode(PLAIN, "rot13"),
        codecs.encode(PLAIN, "rot13").upper(),
        base64.b64encode(PLAIN.encode()).decode(),
        "I decode it: " + base64.b64encode(PLAIN.encode()).decode(),
        "".join(chr(219 - ord(c)) if "a" <= c <= "z" else c for c in PLAIN.lower()),
    ],
)
def test_ciphers_are_unreadable(hidden: str) -> None:
    assert unreadable(hidden)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "",
        "x^2 + 2xy + y^2 = (x + y)^2, so the roots are -3 and 5.",
        "def add(a, b):\n    return sum([a, b])  # the helper for the tests",
        "Zuerst brauche ich einen Plan, der in drei Teile zerfällt.",
        "首先我需要弄清楚用户到底想要什么，然后再写答案。",
        "mfg, bzw. z.B. usw.",
        "See /usr/lib/Python3.11/site-packages/Some_Package-2.10/Module_Name/File3.py for it.",
        "AbstractSingletonProxyFactoryBean2 extends BaseSingletonProxyFactory1.",
        "sha256: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "https://example.org/a/long/path/with/words?and=parameters",
    ],
)
def test_writing_code_and_maths_are_not(text: str) -> None:
    assert not unreadable(text)


def test_no_authored_step_of_the_test_part_is_unreadable_and_their_rot13_is() -> None:
    steps = [
        step for trace in read_authored() if part_of(trace) == "test" and trace.language != "zh" for step in trace.steps
    ]
    assert not [step for step in steps if unreadable(step)]
    hidden = [codecs.encode(step, "rot13") for step in steps if sum(map(str.isalpha, step)) >= 40]
    assert sum(map(unreadable, hidden)) >= 0.99 * len(hidden)


def test_the_table_is_that_of_the_authored_traces() -> None:
    texts = [s for t in read_authored() if part_of(t) != "test" and t.language != "zh" for s in t.steps]
    assert json.loads(TABLE.read_text()) == count_pairs(texts)


def test_base64_of_authored_steps_is_unreadable() -> None:
    steps = [step for trace in read_authored() if part_of(trace) == "test" for step in trace.steps if len(step) >= 40]
    hidden = [base64.b64encode(step.encode()).decode() for step in steps]
    assert sum(map(unreadable, hidden)) >= 0.97 * len(hidden)


def test_a_hostile_run_costs_linear_time() -> None:
    started = time.perf_counter()
    for text in ("a" * 10**6, "aB" * 10**6, "aB1" * 10**6):
        unreadable(text)
    assert time.perf_counter() - started < 0.5


@given(st.text(max_size=300))
def test_never_fails(text: str) -> None:
    assert unreadable(text) in (True, False)
