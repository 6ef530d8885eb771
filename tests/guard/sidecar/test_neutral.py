"""No text that a client writes can become a special token."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from guard.sidecar.errors import Refused
from guard.sidecar.neutral import JOINER, Neutraliser

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PIECES = [*SPECIAL, "<", "|", ">", "<|", "|>", "im_", "start", "think", "</", JOINER, " ", "\n", "<<", "hello"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_no_special_token_survives(neutraliser: Neutraliser, tokenizer: Tokenizer, text: str) -> None:
    clean = neutraliser.clean(text)
    ids = tokenizer.encode(clean, add_special_tokens=False).ids
    assert not neutraliser.ids.intersection(ids)
    assert clean.replace(JOINER, "") == text.replace(JOINER, "")
    if not any(token in text for token in SPECIAL):
        assert clean == text


def test_the_joiner_follows_the_first_character(neutraliser: Neutraliser) -> None:
    assert neutraliser.clean("a<think>b<|im_end|>") == f"a<{JOINER}think>b<{JOINER}|im_end|>"
    assert neutraliser.clean("plain <b>text</b>") == "plain <b>text</b>"


def _tokenizer(tokens: list[AddedToken], normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    made = Tokenizer(models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(tokens)
    return made


def test_delimiters_that_are_not_flagged_special_are_broken_too() -> None:
    made = _tokenizer([AddedToken("<think>", special=False), AddedToken("  ", special=False)])
    assert Neutraliser(made).clean("<think>  x") == f"<{JOINER}think>  x"


def test_spellings_that_only_the_normaliser_makes_special_are_broken() -> None:
    made = _tokenizer([AddedToken("<think>", special=True, normalized=True)], normalizers.NFKC())
    wide = "\uff1cthink\uff1e"
    assert made.encode(wide).tokens == ["<think>"]
    assert Neutraliser(made).clean(wide) == f"\uff1c{JOINER}think\uff1e"


def test_a_normaliser_that_drops_the_joiner_gets_a_space() -> None:
    drop = normalizers.Replace(JOINER, "")
    made = _tokenizer([AddedToken("<think>", special=True, normalized=True)], drop)
    clean = Neutraliser(made).clean("<think>")
    assert clean.replace(JOINER, "") == "< think>"
    assert "<think>" not in made.encode(clean).tokens


def test_truncation_in_the_tokenizer_file_hides_nothing() -> None:
    made = _tokenizer([AddedToken("<think>", special=True, normalized=True)], normalizers.NFKC())
    made.enable_truncation(2)
    text = "x x x \uff1cthink\uff1e"
    assert Neutraliser(made).clean(text) == f"x x x \uff1c{JOINER}think\uff1e"


def test_a_token_of_one_character_is_refused() -> None:
    made = _tokenizer([AddedToken("\u241e", special=True)])
    with pytest.raises(Refused, match="special token of the model that cannot be neutralised"):
        Neutraliser(made).clean("a \u241e b")


def test_a_long_text_holds_up_no_other_thread(neutraliser: Neutraliser) -> None:
    """Every stream of the sidecar would stand still meanwhile."""
    text, ended, longest = "hello there " * 80_000, threading.Event(), 0.0

    def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    assert neutraliser.clean(text) == text
    took = time.perf_counter() - began
    ended.set()
    watching.join()
    assert longest < took / 2
