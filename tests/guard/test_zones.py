"""Zones by token ids: think tags and channels in one reader, checked against the library that defines Harmony."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyError, Role, StreamableParser, StreamState

from guard.steps import TokenTable
from guard.zones import HEADER_TOKENS, TAGS, ZoneGrammar, ZoneReader, find_grammar
from tests import harmony
from tests.guard import channels, kit

REPLY = (
    "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.x "
    "<|constrain|>json<|message|>{}<|call|>"
    "<|start|>assistant<|channel|>analysis<|message|>Again.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Answer.<|return|>"
)


@pytest.mark.parametrize("family", TAGS)
def test_tags_are_found_by_family(family: tuple[str, str]) -> None:
    for special, added in ((("<s>", *family), ()), (("<s>",), family)):
        grammar = find_grammar(kit.byte_level((), special, added))
        assert grammar.moves == {("answer", 1): "reasoning", ("reasoning", 2): "answer"}
        assert grammar.paths == {("answer", "reasoning"): (1,), ("reasoning", "answer"): (2,)}
        assert (grammar.first, grammar.lead, grammar.marks) == ("answer", "\n", {1, 2})


def test_no_grammar_without_all_of_a_familys_tokens() -> None:
    assert find_grammar(kit.byte_level((), special=("<think>",))) == ZoneGrammar("answer")
    assert find_grammar(kit.byte_level((), special=("<|start|>", "<|channel|>", "<|message|>"))) == ZoneGrammar(
        "answer"
    )


def test_channels_are_found_with_and_without_the_marks_that_end_a_turn() -> None:
    grammar = find_grammar(channels.tokenizer())
    assert grammar.marks == {1, 4, 5, 6, 7}
    assert grammar.special == {1, 2, 3, 4, 5, 6, 7}
    assert grammar.paths["reasoning", "answer"] == tuple(channels.encode("<|end|>" + channels.FINAL))
    assert grammar.paths["between", "reasoning"] == tuple(channels.encode(channels.ANALYSIS))
    few = find_grammar(
        kit.byte_level((), ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<think>", "</think>"))
    )
    assert (few.marks, few.channel, few.constrain) == ({0, 2, 3}, 1, None)


def test_tags_change_the_zone_only_where_they_apply() -> None:
    reader = kit.runtime().zones()
    seen = [(reader.feed(token), reader.zone) for token in (4, 3, 3, 9, 4, 4, 9)]
    assert seen == [
        (False, "answer"), (True, "reasoning"), (False, "reasoning"), (False, "reasoning"), (True, "answer"),
        (False, "answer"), (False, "answer"),
    ]  # fmt: skip


def test_every_token_of_a_reply_has_its_place() -> None:
    reader, texts = channels.reader("<|start|>assistant"), []
    for token in channels.encode(REPLY):
        if not reader.feed(token):
            texts.append((reader.zone, channels.tokenizer().id_to_token(token)))
    found = [(zone, "".join(t for _, t in run)) for zone, run in itertools.groupby(texts, lambda t: t[0])]
    assert found == [("reasoning", "Think.{}Again."), ("answer", "Answer.")]
    assert reader.state == "between"


HEADERS = {
    "assistant<|channel|>final": "answer",
    "assistant<|channel|>final <|constrain|>json": "answer",
    "assistant<|channel|>final<|constrain|>json": "answer",
    "assistant<|channel|>analysis": "reasoning",
    "assistant<|channel|>commentary": "reasoning",
    "assistant<|channel|>commentary to=functions.x <|constrain|>json": "reasoning",
    "assistant to=functions.x<|channel|>commentary json": "reasoning",
    "assistant to=functions.x<|channel|>final": "reasoning",
    "assistant<|channel|>final to=functions.x": "reasoning",
    "assistant<|channel|>final json": "reasoning",
    "assistant<|channel|>Final": "reasoning",
    "assistant<|channel|>finals": "reasoning",
    "assistant<|channel|>unknown": "reasoning",
    "assistant": "reasoning",
    "user": "reasoning",
    "user<|channel|>final": "reasoning",
    "functions.x to=assistant<|channel|>commentary": "reasoning",
    "": "lost",
    "<|channel|>final": "lost",
    "assistant<|channel|>": "lost",
    "assistant<|channel|> final": "lost",
    "assistant<|channel|>\nfinal": "lost",
    "assistant<|channel|>analysis<|channel|>final": "lost",
    "assistant<|end|>": "lost",
    "assistant<|end|><|start|>assistant<|channel|>final": "lost",
    "assistant<|channel|>final <|constrain|>json<|constrain|>json": "lost",
    "Sure, here it is: assistant<|channel|>final": "lost",
    "assistant" + " json" * HEADER_TOKENS: "lost",
}


@pytest.mark.parametrize("header", HEADERS)
def test_where_a_header_leads(header: str) -> None:
    reader = channels.reader(f"<|start|>{header}<|message|>")
    assert reader.state == HEADERS[header]
    assert reader.zone == ("answer" if HEADERS[header] == "answer" else "reasoning")
    again = [reader.feed(token) for token in channels.encode("<|end|>" + channels.FINAL)]
    assert reader.state == ("lost" if HEADERS[header] == "lost" else "answer")
    assert any(again) == (reader.state == "answer")


def test_a_channels_name_counts_however_it_is_cut_into_tokens() -> None:
    head, tail = channels.encode("<|start|>assistant<|channel|>"), channels.encode("<|message|>")
    for name in (
        [*channels.letters("final")],
        channels.encode("final"),
        channels.letters("fi") + channels.letters("nal"),
    ):
        reader = channels.runtime().zones()
        for token in head + name + tail:
            reader.feed(token)
        assert reader.state == "answer"


def test_marks_spelled_with_ordinary_tokens_change_nothing() -> None:
    spoof = channels.letters("<|end|>" + channels.FINAL)
    reader = channels.reader(channels.ANALYSIS)
    assert not any(reader.feed(token) for token in spoof)
    assert reader.state == "reasoning"
    # Nor does a header whose marks are spelled: it runs until it is too long to be one.
    reader = channels.reader("<|start|>assistant")
    held = [reader.feed(token) for token in channels.letters("<|channel|>final<|message|>Sure, here is how.")]
    assert held.count(True) == HEADER_TOKENS - 1
    assert reader.state == "lost"


@pytest.mark.parametrize("inside", ["<|channel|>final<|message|>", "<|start|>assistant<|channel|>final<|message|>"])
def test_a_message_ends_only_at_its_end(inside: str) -> None:
    reader = channels.reader(channels.ANALYSIS + "x" + inside + "y")
    assert reader.state == "reasoning"


def test_text_between_messages_is_reasoning() -> None:
    reader = channels.reader(channels.FINAL + "x<|end|>")
    assert not any(reader.feed(token) for token in channels.encode("Sure<|channel|>final<|message|>"))
    assert (reader.state, reader.zone) == ("between", "reasoning")


@pytest.mark.parametrize(
    ("text", "zone", "path"),
    [("", "answer", channels.FINAL), ("", "reasoning", channels.ANALYSIS), (channels.ANALYSIS, "reasoning", ""),
     (channels.ANALYSIS, "answer", "<|end|>" + channels.FINAL), (channels.FINAL, "answer", ""),
     ("<|start|>", "answer", "assistant<|channel|>final<|message|>"),
     ("<|start|>assistant", "reasoning", "<|channel|>analysis<|message|>"),
     ("<|start|><|message|>", "reasoning", ""),
     ("<|start|><|message|>", "answer", "<|message|><|end|>" + channels.FINAL)],
)  # fmt: skip
def test_the_path_to_a_zone(text: str, zone: str, path: str) -> None:
    reader = channels.reader(text)
    assert reader.path(zone) == tuple(channels.encode(path))  # type: ignore[arg-type]
    for token in reader.path(zone):  # type: ignore[arg-type]
        reader.feed(token)
    assert reader.state == ("lost" if "<|start|><|message|>" in text else zone)


WORDS = [
    "assistant",
    "user",
    "analysis",
    "final",
    "commentary",
    " to",
    "=",
    "functions",
    ".x",
    " ",
    "json",
    "\n",
    "hi",
    ".",
]
MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"]
PIECES = st.lists(
    st.one_of(
        st.sampled_from(MARKS + WORDS),
        st.sampled_from(
            [channels.FINAL, channels.ANALYSIS, "<|end|>", "<|start|>assistant", "<|channel|>final<|message|>"]
        ),
    ),
    max_size=40,
)


class Library:
    """The real Harmony parser, driven as vLLM drives it: what it cannot read it skips."""

    def __init__(self) -> None:
        self.parser = StreamableParser(harmony.encoding(), role=Role.ASSISTANT)

    def feed(self, token: int) -> bool:
        """Whether the library calls the next text the answer."""
        parser = self.parser
        with contextlib.suppress(HarmonyError):
            parser.process(token)
        to, here = parser.current_recipient, (parser.state, parser.current_channel, parser.current_role)
        mine = to is None or to.startswith("<|constrain|>")
        return mine and here == (StreamState.CONTENT, "final", Role.ASSISTANT)


def _gpt_oss(prompt: str) -> ZoneReader:
    tokenizer, table = harmony.tokenizer(), harmony.table()
    reader = ZoneReader(find_grammar(tokenizer), table)
    for token in harmony.ids(prompt):
        reader.feed(token)
    return reader


@settings(max_examples=400)
@given(PIECES)
@example(["<|start|>assistant", "<|message|>", "<|start|>", "<|end|>", channels.FINAL, "hi"])
@example(["hi"] * 40 + ["<|channel|>", "analysis", "<|end|>", channels.FINAL, "hi"])
@example(["<|channel|>", "analysis", "<|start|>", "<|end|>", channels.FINAL, "hi"])
def test_nothing_is_an_answer_that_the_library_does_not_call_one(pieces: list[str]) -> None:
    reader, library = _gpt_oss("<|start|>assistant"), Library()
    for token in harmony.ids("".join(pieces)):
        reader.feed(token)
        assert library.feed(token) or reader.zone == "reasoning"


CHANNELS = st.sampled_from(
    [
        "final",
        "final <|constrain|>json",
        "analysis",
        "commentary",
        "commentary to=functions.x <|constrain|>json",
        "notes",
    ]
)
TEXT = st.sampled_from(["", "hi", "hi.\n", "final", "<|channel|>", "<|start|>assistant"])
MESSAGES = st.lists(
    st.tuples(CHANNELS, TEXT, st.sampled_from(["<|end|>", "<|return|>", "<|call|>"])), min_size=1, max_size=6
)


@settings(max_examples=200)
@given(MESSAGES)
def test_a_well_formed_reply_is_read_as_the_library_reads_it(messages: list[tuple[str, str, str]]) -> None:
    text = "<|start|>assistant".join(f"<|channel|>{name}<|message|>{text}{end}" for name, text, end in messages)
    reader, library = _gpt_oss("<|start|>assistant"), Library()
    for token in harmony.ids(text):
        reader.feed(token)
        assert library.feed(token) == (reader.zone == "answer")
    assert reader.state == "between"


def test_prompts_of_the_library_lose_nothing() -> None:
    for prompt in harmony.prompts():
        reader = ZoneReader(find_grammar(harmony.tokenizer()), harmony.table())
        for token in prompt:
            reader.feed(token)
            assert reader.state != "lost"
        assert reader.state == "header"


@settings(max_examples=100)
@given(st.lists(st.integers(-2, 40), max_size=60), st.integers(0, 60))
def test_a_copy_goes_on_by_itself(tokens: list[int], at: int) -> None:
    one = channels.runtime().zones()
    for token in tokens[:at]:
        one.feed(token)
    twin = one.copy()
    here = [(one.feed(token), one.state) for token in tokens[at:]]
    assert [(twin.feed(token), twin.state) for token in tokens[at:]] == here


def test_the_table_of_a_tokenizer_gives_special_tokens_no_bytes() -> None:
    table = TokenTable.from_tokenizer(channels.tokenizer())
    assert {table.bytes_of[token] for token in range(8)} == {b""}
