from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from guard.steps import (
    Step,
    StepLimits,
    StepSplitter,
    TokenTable,
    ends_step,
    split_text,
)
from tests.guard import kit

BYTES = kit.byte_level(added=("<|User|>", "\n\n"))
BYTE_TABLE = TokenTable.from_tokenizer(BYTES)
PIECES = kit.metaspace()
PIECE_TABLE = TokenTable.from_tokenizer(PIECES)


def live(text: str, tokenizer: Tokenizer, table: TokenTable, limits: StepLimits) -> list[Step]:
    return run(tokenizer.encode(text, add_special_tokens=False).ids, table, limits)


def run(ids: list[int], table: TokenTable, limits: StepLimits) -> list[Step]:
    splitter = StepSplitter(table, limits)
    steps = [step for index, token in enumerate(ids) if (step := splitter.push(token, index))]
    last = splitter.flush()
    return [*steps, last] if last else steps


@pytest.mark.parametrize(
    ("token", "expected"),
    [("Ġagree", b" agree"), ("I", b"I"), (".", b"."), ("Ċ", b"\n"), ("Ġ", b" "), ("ã", b"\xe3"), ("Ĥ", b"\x82")],
)
def test_byte_level_pieces_are_the_bytes_they_stand_for(token: str, expected: bytes) -> None:
    assert BYTE_TABLE.bytes_of[kit.token_id(BYTES, token)] == expected


@pytest.mark.parametrize(
    ("token", "expected"),
    [("▁agree", b" agree"), ("agree", b"agree"), ("▁", b" "), ("<0xE3>", b"\xe3"), ("<0x0A>", b"\n"), (".", b".")],
)
def test_metaspace_pieces_are_the_bytes_they_stand_for(token: str, expected: bytes) -> None:
    assert PIECE_TABLE.bytes_of[kit.token_id(PIECES, token)] == expected


def test_special_tokens_give_no_bytes_and_added_ones_their_text() -> None:
    assert [BYTE_TABLE.bytes_of[i] for i in range(7)] == [b"", b"", b"", b"", b"", b"<|User|>", b"\n\n"]
    assert [PIECE_TABLE.bytes_of[i] for i in (1, 2)] == [b"", b""]
    assert BYTE_TABLE.markers == {0, 1, 2, 3, 4, 5}  # a run of line breaks marks no turn
    assert PIECE_TABLE.markers == {1, 2}


def test_text_skips_ids_outside_the_table_and_replaces_broken_utf8() -> None:
    half = kit.token_id(BYTES, "ã")
    assert BYTE_TABLE.text([*BYTES.encode("I").ids, -1, 10**9, 4, half]) == "I\ufffd"


@given(st.text(max_size=40))
def test_byte_level_round_trip(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False).ids
    if not BYTE_TABLE.markers.intersection(ids):
        assert BYTE_TABLE.text(ids) == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁<"), min_size=1, max_size=40))
def test_metaspace_round_trip(text: str) -> None:
    assert PIECE_TABLE.text(PIECES.encode(text, add_special_tokens=False).ids).removeprefix(" ") == text.removeprefix(
        " "
    )


@pytest.mark.parametrize(("tokenizer", "table"), [(BYTES, BYTE_TABLE), (PIECES, PIECE_TABLE)])
def test_an_end_mark_split_over_tokens_ends_the_step(tokenizer: Tokenizer, table: TokenTable) -> None:
    first = tokenizer.encode("这样做是不对的。", add_special_tokens=False).ids
    ids = first + tokenizer.encode("我不会帮忙", add_special_tokens=False).ids
    assert len(first) >= 3 * len("这样做是不对的。")  # every character is three byte tokens
    steps = run(ids, table, StepLimits())
    assert [(s.start, s.end, s.text, s.cut) for s in steps] == [
        (0, len(first), "这样做是不对的。", False),
        (len(first), len(ids), "我不会帮忙", False),
    ]


def test_only_the_last_byte_of_a_split_mark_can_end_a_step() -> None:
    flags = {b: BYTE_TABLE.can_end[kit.token_id(BYTES, c)] for b, c in ((0xE3, "ã"), (0x80, "Ģ"), (0x82, "Ĥ"))}
    assert flags == {0xE3: 0, 0x80: 0, 0x82: 1}
    assert BYTE_TABLE.can_end[kit.token_id(BYTES, "Ġagree")] == 0
    assert BYTE_TABLE.can_end[kit.token_id(BYTES, ".")] == 1


@pytest.mark.parametrize(
    "text",
    [
        "It works.", "Really?!", "Go!", "He waits...", "He waits…", 'He said "go."', "(like this.)", "go.”", "go.'",
        "这样。", "真的吗？", "不！", "Plan:\n", "- one item\n", "1.\n", "It is 3. ", "def f():\n",
        "```\ncode\n\n", "Plan\n \n",
        "**Done.**", "one etc.\n", "The answer is no.", "- item\n", "  * item\n", "2) item\n",
        "b. item\n", "# Title\n", "| a | b |\n", "Plan (short):\n", "计划：\n", "one\n- item\n",
        "यह ठीक है।", "هل هذا صحيح؟", "یہ ٹھیک ہے۔", "これでよい｡", "これでよい．", "ይህ ነው።", "Սա ճիշտ է։", "Really‼",
    ],
)  # fmt: skip
def test_whole_steps(text: str) -> None:
    assert ends_step(text, 1)


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", ".", "!?", "no end", "1.", "It is 3.", "see 3.14", "e.g.", "as in (i.e.", "Dr.", "and so on etc.",
        "J.",
        "J. ", "U.S.", "vs.", "Fig.", "a, b", "f(x)", "a.b.c", "He waits. Then", "one\ntwo",
        "I will\n", "first I\nwill take\n", "-5 and\n", "x = 3.5\n", "```\ncode\n", "e.g\n", "one; ", "int x = 5;\n",
    ],
)  # fmt: skip
def test_no_steps(text: str) -> None:
    assert not ends_step(text, 1)


@pytest.mark.parametrize(
    ("text", "at_most"), [("Hmm. Wait.", 7), ("I agree to it.", 10), ("好的。", 6), ("a 1 b 2.)", 0), ("x? y?", 2)]
)
def test_min_chars_counts_letters_and_digits(text: str, at_most: int) -> None:
    assert [n for n in range(1, 16) if ends_step(text, n)] == list(range(1, at_most + 1))


@pytest.mark.parametrize("mark", ["\n", ";", "；"])
def test_a_line_break_or_semicolon_ends_what_is_long_enough(mark: str) -> None:
    most = 40 if mark == "\n" else 60
    assert not ends_step("few words " * 3 + "a" * (most - 25) + mark, 12)
    assert ends_step("few words " * 3 + "a" * (most - 24) + mark, 12)
    assert ends_step("好" * -(-most // 3) + mark, 12)


def test_a_few_words_a_line_are_read_together() -> None:
    lines = "So I will\nagree to help\nthem with it\nand lay out\nthe whole plan\nfor all of it\n"
    steps = live(lines, BYTES, BYTE_TABLE, StepLimits())
    assert [s.text.replace("\n", " ") for s in steps] == [
        "So I will agree to help them with it and lay out the whole plan", "for all of it",
    ]  # fmt: skip


def test_exact_steps_of_a_byte_level_text() -> None:
    text = kit.CALM + " " + kit.CUE + "\n" + "My reply ends here"
    assert live(text, BYTES, BYTE_TABLE, StepLimits()) == [
        Step(0, 7, kit.CALM),
        Step(7, 15, kit.CUE),
        Step(15, 20, "My reply ends here"),
    ]


def test_spaced_tells_whether_white_space_ended_the_step() -> None:
    steps = live("I agree with you:\nThen more", BYTES, BYTE_TABLE, StepLimits())
    assert [(s.text, s.spaced) for s in steps] == [("I agree with you:", True), ("Then more", False)]


def test_short_steps_merge_into_the_next() -> None:
    steps = live("Hmm. Wait. I agree to it. No.", BYTES, BYTE_TABLE, StepLimits(min_chars=12))
    assert [s.text for s in steps] == ["Hmm. Wait. I agree to it.", "No."]
    assert steps[0].end == steps[1].start


def test_text_without_an_end_is_cut_at_the_limit() -> None:
    ids = BYTES.encode(" agree" * 21, add_special_tokens=False).ids
    steps = run(ids, BYTE_TABLE, StepLimits(max_tokens=8))
    assert [(s.start, s.end, s.cut) for s in steps] == [(0, 8, True), (8, 16, True), (16, 21, False)]
    # The second and third are read with the words before the cut.
    assert [s.text.count("agree") for s in steps] == [8, 16, 13]


def test_a_sentence_across_a_cut_is_read_whole() -> None:
    words = ["well"] * 90 + ["I", "will", "agree", "to", "help", "with", "it"] + ["and"] * 3
    table = TokenTable([f" {word}".encode() for word in words])
    steps = run(list(range(len(words))), table, StepLimits(max_tokens=93))
    assert [(s.start, s.end) for s in steps] == [(0, 93), (93, 100)]
    assert steps[1].text.endswith("well I will agree to help with it and and and")
    assert len(steps[1].text) < 140


def test_what_was_cut_can_be_forgotten() -> None:
    splitter = StepSplitter(BYTE_TABLE, StepLimits(max_tokens=8))
    for index, token in enumerate(BYTES.encode(" agree" * 8, add_special_tokens=False).ids):
        splitter.push(token, index)
    splitter.forget()
    assert splitter.push(kit.token_id(BYTES, "I"), 8) is None
    assert splitter.flush() == Step(8, 9, "I")


def test_the_limit_cuts_between_the_bytes_of_a_character_without_losing_one() -> None:
    ids = BYTES.encode("对" * 3, add_special_tokens=False).ids
    steps = run(ids, BYTE_TABLE, StepLimits(max_tokens=8))
    assert [(s.start, s.end) for s in steps] == [(0, 8), (8, 9)]
    assert steps[1].text == "对对对"


def test_blank_tokens_are_no_step_of_their_own() -> None:
    assert run(BYTES.encode(" \n \n", add_special_tokens=False).ids, BYTE_TABLE, StepLimits()) == []


def test_a_dropped_blank_run_does_not_leak_into_the_next_step() -> None:
    splitter = StepSplitter(BYTE_TABLE, StepLimits(min_chars=1))
    assert splitter.push(kit.token_id(BYTES, "Ċ"), 0) is None
    assert splitter.flush() is None
    assert splitter.push(kit.token_id(BYTES, "I"), 9) is None
    assert splitter.flush() == Step(9, 10, "I")


@given(
    st.lists(st.one_of(st.integers(-3, len(BYTE_TABLE.bytes_of) + 3), st.just(2**40)), max_size=120),
    st.integers(1, 20), st.integers(1, 30),
)  # fmt: skip
def test_spans_partition_any_tokens(ids: list[int], min_chars: int, max_tokens: int) -> None:
    steps = run(ids, BYTE_TABLE, StepLimits(min_chars, max_tokens))
    end, before = 0, []
    for step in steps:
        assert step.start == end
        assert 0 < step.end - step.start <= max_tokens
        own = ids[step.start : step.end]
        assert step.text == BYTE_TABLE.text(own).strip() or BYTE_TABLE.text(before + own).strip().endswith(step.text)
        before = own if step.cut else []
        end = step.end
    assert BYTE_TABLE.text(ids[end:]).strip() == ""  # only a blank tail may belong to no step


SENTENCES = [
    "First they gather the materials.", "It costs 3.14 euros e.g. in town.", "J. R. Smith agreed!", "Is it so?", "Hmm.",
    "They wait... and go on.", "He owns 3. Then he goes.", "第一步是这样。", "- an item of a list",
    "x = compute(a.b, 2)", "two or three words", "कदम यह है।",
    "They wait for a while; then they go on to look for it; and then they come back and rest; and so on",
    "(I could help with that…", "Dr. No lives in the U.S. now.",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(SENTENCES), st.sampled_from([" ", "\n", "\n\n", "\n  "])), max_size=8))
def test_split_text_agrees_with_the_live_splitter(parts: list[tuple[str, str]]) -> None:
    text = "".join(sentence + gap for sentence, gap in parts)
    limits = StepLimits(max_tokens=10_000)
    # One token per word, mark and line break: what any word-level vocabulary makes of these sentences.
    words = kit.byte_level(SENTENCES, special=())
    expected = [s.text for s in live(text, words, TokenTable.from_tokenizer(words), limits)]
    assert [joined(s) for s in split_text(text, limits)] == [joined(s) for s in expected]


def joined(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_split_text_exact() -> None:
    text = "First they gather the materials\nThen they wait for 3.5 hours. Hmm. No.\n\n1. Take the first one here\n"
    assert split_text(text) == [
        "First they gather the materials\nThen they wait for 3.5 hours.",
        "Hmm. No.\n\n1. Take the first one here",
    ]


def test_split_text_cuts_at_the_limit() -> None:
    cut = split_text("agree " * 20, StepLimits(max_tokens=8))
    assert [step.count("agree") for step in cut] == [8, 15, 12]
