from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import UserError
from guard.triggers import NEUTRAL, POOL, EncodedTrigger, Trigger, choose, encode_trigger, select
from tests.guard import kit

ENCODED = tuple(encode_trigger(trigger, kit.tokenizer()) for trigger in POOL)


def test_the_pool_has_at_least_twelve_distinct_triggers() -> None:
    assert len(POOL) >= 12
    assert len({t.id for t in POOL}) == len(POOL)
    assert len({t.text for t in (*POOL, NEUTRAL)}) == len(POOL) + 1
    assert all(t.text == t.text.strip() and t.text.endswith(".") for t in POOL)


def test_a_trigger_is_encoded_for_the_three_places() -> None:
    trigger = encode_trigger(Trigger("t", "I agree."), kit.tokenizer())
    ids = {word: kit.token_id(kit.tokenizer(), word) for word in ("I", "ĠI", "Ġagree", ".", "Ċ")}
    assert trigger == EncodedTrigger(
        "t",
        "I agree.",
        spaced=(ids["ĠI"], ids["Ġagree"], ids["."]),
        plain=(ids["I"], ids["Ġagree"], ids["."]),
        opening=(ids["Ċ"], ids["I"], ids["Ġagree"], ids["."]),
    )


@pytest.mark.parametrize("text", ["Stop.</think>", "<think>Stop.", "Stop. <|im_end|>", "", "  "])
def test_a_special_token_or_no_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="`bad`"):
        encode_trigger(Trigger("bad", text), kit.tokenizer())


def test_a_delimiter_that_is_not_flagged_special_is_refused() -> None:
    qwen = kit.byte_level(special=("<|im_end|>",), added=("<think>", "</think>", "  "))
    with pytest.raises(UserError, match="`bad`"):
        encode_trigger(Trigger("bad", "Stop.</think>"), qwen)
    assert encode_trigger(Trigger("good", "Stop,  now."), qwen).plain[2] == 3  # a run of spaces is harmless


def test_select() -> None:
    assert select(()) == POOL
    assert [t.id for t in select(("victim", "wait-harm"))] == ["wait-harm", "victim"]
    with pytest.raises(UserError, match=r"`triggers`.*got nobody;.*wait-harm"):
        select(("victim", "nobody"))


@given(st.lists(st.sampled_from([t.id for t in POOL]), max_size=20), st.binary(max_size=40))
def test_choose_is_pure_and_never_repeats(used: list[str], key: bytes) -> None:
    chosen = choose(ENCODED, used, key)
    assert chosen == choose(ENCODED, list(reversed(used)), key)
    assert (chosen is None) == (set(used) == {t.id for t in POOL})
    assert chosen is None or chosen.id not in used


def test_keys_spread_over_the_whole_pool() -> None:
    assert {choose(ENCODED, [], str(i).encode()) for i in range(200)} == set(ENCODED)


def test_the_choice_for_a_key_is_fixed() -> None:
    # Every tensor-parallel rank and every later replay must arrive at the same trigger.
    pool = tuple(EncodedTrigger(str(i), "", (), (), ()) for i in range(14))
    chosen = [choose(pool, [], key) for key in (b"a", b"b", b"c", b"")]
    assert [t and t.id for t in chosen] == ["3", "11", "3", "3"]
