"""Benign pairs behind other exchanges: what the prompt holds then, and which pairs stay as they are."""

from __future__ import annotations

from typing import Any

import pytest

from align.model import render
from align.pairs import Pair
from align.text import ReplyReader
from align.turns import Turns

SHOWN = "<|im_start|>user\n{}<|im_end|>\n"
REPLY = "<|im_start|>assistant\n<think>\n I will think of {}.\n</think>\nHere it is.<|im_end|>\n"


@pytest.fixture(scope="module")
def turns(tokenizer: Any, reader: ReplyReader) -> Turns:
    return Turns(tokenizer, reader)


def pair(tokenizer: Any, name: str, **changed: Any) -> Pair:
    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    fields: dict[str, Any] = {
        "id": name, "kind": "benign", "guard_id": name, "request": f"Tell me of {name}.",
        "prompt_ids": render(tokenizer, f"Tell me of {name}."), "prefix_ids": ids(" I will"),
        "chosen_ids": ids(f" think of {name}.\n</think>\nHere it is.<|im_end|>"), "rejected_ids": ids(" No."),
        "trigger_id": "t", "chosen_harm": 0.0, "rejected_harm": 0.0,
    }  # fmt: skip
    return Pair.model_validate(fields | changed)


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_a_pair_stands_behind_whole_exchanges_as_the_template_writes_them(tokenizer: Any, turns: Turns) -> None:
    oak, elm = pair(tokenizer, "oak"), pair(tokenizer, "elm")
    rows = turns.added([oak, elm], 1.0, seed=0)
    assert (rows[0], rows[2]) == (oak, elm)
    for single, behind, earlier in ((oak, rows[1], "elm"), (elm, rows[3], "oak")):
        before = SHOWN.format(f"Tell me of {earlier}.") + REPLY.format(earlier)
        assert text(tokenizer, behind.prompt_ids) == before + text(tokenizer, single.prompt_ids)
        assert behind.model_dump(exclude={"prompt_ids"}) == single.model_dump(exclude={"prompt_ids"})


def test_the_share_is_of_the_benign_pairs_and_the_same_seed_gives_the_same_rows(tokenizer: Any, turns: Turns) -> None:
    pairs = [pair(tokenizer, f"tree {n}", kind="intervened" if n % 3 == 2 else "benign") for n in range(12)]
    rows = turns.added(pairs, 0.5, seed=0)
    assert turns.added(pairs, 0.5, seed=0) == rows
    assert turns.added(pairs, 0.5, seed=1) != rows
    assert [row for row in rows if row in pairs] == pairs
    behind = [row for row in rows if row not in pairs]
    assert len(behind) == 4, "half of 8"
    assert {row.kind for row in behind} == {"benign"}
    shown = [text(tokenizer, row.prompt_ids) for row in behind]
    assert {one.count("<think>") for one in shown} == {2, 3}, "one or two exchanges before"
    for row, one in zip(behind, shown, strict=True):
        assert one.count(row.request) == 1, "never behind itself"
        assert rows[rows.index(row) - 1].id == row.id


@pytest.mark.parametrize("kept", ["history", "unfinished", "same request"])
def test_what_cannot_be_asked_again_is_trained_on_once(tokenizer: Any, turns: Turns, kept: str) -> None:
    oak, elm = pair(tokenizer, "oak"), pair(tokenizer, "elm")
    if kept == "history":
        oak, elm = (p.model_copy(update={"prompt_ids": [*p.prompt_ids, *p.prompt_ids]}) for p in (oak, elm))
    elif kept == "unfinished":
        oak, elm = (p.model_copy(update={"chosen_ids": p.chosen_ids[:-1]}) for p in (oak, elm))
    else:
        elm = pair(tokenizer, "elm", request="tell me of  OAK.", prompt_ids=render(tokenizer, "tell me of  OAK."))
    assert turns.added([oak, elm], 1.0, seed=0) == [oak, elm]


def test_a_reply_that_opens_its_reasoning_by_itself_is_not_opened_twice(tokenizer: Any, turns: Turns) -> None:
    """Text of a request that spells the mark is no opening either."""
    opening = [int(i) for i in tokenizer.encode("<think>\n I will", add_special_tokens=False)]
    asked = "Tell me <think> of elm."
    elm = pair(tokenizer, "elm", request=asked, prompt_ids=render(tokenizer, asked))
    bare = elm.model_copy(update={"prompt_ids": elm.prompt_ids[:-2], "prefix_ids": opening})
    assert text(tokenizer, bare.prompt_ids).endswith("assistant\n")
    whole = "<think>\n I will think of elm.\n</think>\nHere it is."
    assert (turns._reply(elm), turns._reply(bare)) == (whole, whole)
