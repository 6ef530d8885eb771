"""Intervened pairs once more, against a benign reply: which side they get, and which pairs stay as they are."""

from __future__ import annotations

from typing import Any

import pytest

from align.contrast import contrasted
from align.pairs import Pair

DOT, START = 9, 1
TRIGGER, CALM = [50, 51], [60, 61, 62]


def pair(name: str, kind: str, **changed: Any) -> Pair:
    fields: dict[str, Any] = {
        "id": name, "kind": kind, "guard_id": name, "request": f"about {name}", "prompt_ids": [2, START],
        "prefix_ids": [20, DOT], "chosen_ids": TRIGGER if kind == "intervened" else CALM,
        "rejected_ids": [70, 71] if kind == "intervened" else TRIGGER, "trigger_id": "t", "chosen_harm": 0.1,
        "rejected_harm": 0.9, "chosen_finish": "stop", "rejected_finish": "length",
    }  # fmt: skip
    return Pair.model_validate(fields | changed)


HARMFUL, BENIGN = pair("harmful", "intervened"), pair("benign", "benign")


def test_the_other_row_prefers_the_trigger_to_the_benign_reply() -> None:
    first, second, third = contrasted([HARMFUL, BENIGN], [BENIGN], 1.0, seed=0)
    assert (first, third) == (HARMFUL, BENIGN)
    changed = {"rejected_ids": CALM, "rejected_harm": 0.1, "rejected_finish": "stop"}
    assert second.model_dump() == HARMFUL.model_dump() | changed


def test_the_benign_reply_may_be_one_that_is_not_trained_on() -> None:
    """A stage on intervened pairs alone knows what it must not confuse them with all the same."""
    rows = contrasted([HARMFUL], [BENIGN], 1.0, seed=0)
    assert [row.rejected_ids for row in rows] == [HARMFUL.rejected_ids, CALM]


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"prefix_ids": [20, 30]}, id="follows another token"),
        pytest.param({"prefix_ids": []}, id="begins the reply"),
        pytest.param({"chosen_ids": [TRIGGER[0], 61]}, id="begins as the trigger does"),
        pytest.param({"request": " About  HARMFUL"}, id="of the same request"),
    ],
)
def test_a_side_that_does_not_fit_is_not_used(changed: dict[str, Any]) -> None:
    other = pair("benign", "benign", **changed)
    assert contrasted([HARMFUL], [other], 1.0, seed=0) == [HARMFUL]


def test_at_the_start_of_a_reply_the_prompts_last_token_counts() -> None:
    at_start = pair("harmful", "intervened", prefix_ids=[])
    fits = pair("benign", "benign", prefix_ids=[])
    assert [r.rejected_ids for r in contrasted([at_start], [BENIGN, fits], 1.0, seed=0)] == [[70, 71], CALM]
    elsewhere = pair("benign", "benign", prefix_ids=[], prompt_ids=[2, 3])
    assert contrasted([at_start], [BENIGN, elsewhere], 1.0, seed=0) == [at_start]


def test_the_share_is_of_the_intervened_pairs_and_the_seed_decides() -> None:
    pairs = [pair(f"h{n}", "intervened") for n in range(8)]
    benign = [pair(f"b{n}", "benign", chosen_ids=[60 + n, 61]) for n in range(8)]
    rows = contrasted(pairs, benign, 0.5, seed=0)
    assert len(rows) == 8 + 4
    assert [row for row in rows if row in pairs] == pairs
    assert len({tuple(row.rejected_ids) for row in rows if row not in pairs}) > 1, "not one reply for all"
    assert contrasted(pairs, benign, 0.5, seed=0) == rows
    assert contrasted(pairs, benign, 0.5, seed=1) != rows
    assert contrasted([BENIGN], benign, 1.0, seed=0) == [BENIGN]
