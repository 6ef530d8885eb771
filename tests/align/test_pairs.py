"""Pairs: which tokens carry the preference, duplicates and quotas, and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.pairs import Pair, Quota, Scope, Steps, cut, dedupe, pair_id, read_pairs, write_pairs
from guard.errors import UserError
from guard.steps import StepLimits, TokenTable

# 0 is a delimiter; 1..: "Wait, this hurts people." in two tokens, "So I have to refuse." in one, then no end
TABLE = TokenTable(
    [b"", b" Wait, this hurts", b" people.", b" So I have to refuse.", b" and then nothing more"], frozenset([0])
)
LIMITS = StepLimits(min_chars=5, max_tokens=50)


def make(pair: int = 1, **changes: object) -> Pair:
    fields: dict[str, object] = {
        "id": pair_id(pair), "kind": "intervened", "guard_id": "g", "request": "r", "prompt_ids": [1],
        "prefix_ids": [2],
        "chosen_ids": [3], "rejected_ids": [4], "trigger_id": "t", "chosen_harm": 0.1, "rejected_harm": 0.9,
    }  # fmt: skip
    return Pair.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("ids", "steps", "kept"),
    [
        ([1, 2, 3, 0, 4], 1, [1, 2]),
        ([1, 2, 3, 0, 4], 2, [1, 2, 3]),
        ([1, 2, 4, 0, 4], 2, [1, 2, 4, 0]),
        ([1, 2, 3, 0, 4], 3, [1, 2, 3, 0]),
        ([1, 2, 3, 0, 4], "reasoning", [1, 2, 3, 0]),
        ([1, 2, 3, 0, 4], None, [1, 2, 3, 0, 4]),
        ([4, 4], 1, [4, 4]),
    ],
)
def test_scope_cuts_at_step_ends_and_at_delimiters(ids: list[int], steps: Steps, kept: list[int]) -> None:
    assert cut(ids, steps, TABLE, LIMITS) == kept


@pytest.mark.parametrize(
    ("kind", "scope", "sides"),
    [
        ("intervened", Scope(), ([1, 2, 3], [3, 2])),
        ("intervened", Scope(steps=1), ([1, 2], [3])),
        ("benign", Scope(), ([1, 2, 3, 0], [3, 2])),
        ("benign", Scope(steps=1, benign_steps=1), ([1, 2], [3])),
        ("benign", Scope(steps=1, benign_steps=None), ([1, 2, 3, 0, 4], [3])),
        ("benign", Scope(steps=None, benign_steps=None), ([1, 2, 3, 0, 4], [3, 2, 1])),
    ],
)
def test_a_benign_pairs_own_side_goes_on_to_where_its_reasoning_closes(
    kind: str, scope: Scope, sides: tuple[list[int], list[int]]
) -> None:
    pair = make(kind=kind, chosen_ids=[1, 2, 3, 0, 4], rejected_ids=[3, 2, 1])
    assert scope.cut(pair, TABLE, LIMITS) == sides


def test_dedupe_drops_repeats_and_keeps_the_quotas() -> None:
    others = [make(3, chosen_ids=[9]), make(4, chosen_ids=[10]), make(5, request="other", chosen_ids=[11])]
    pairs = [make(1), make(2), *others]
    kept, dropped = dedupe(pairs, Quota(per_request=2))
    assert [p.chosen_ids for p in kept] == [[3], [9], [11]]
    assert dropped == {"repeat": 1, "over the request's quota": 1}


def test_no_wording_of_white_space_and_case_buys_a_second_quota() -> None:
    pairs = [make(n, request=request, chosen_ids=[n]) for n, request in enumerate(["How so?", "how  SO?\n", "Else?"])]
    kept, dropped = dedupe(pairs, Quota(per_request=1))
    assert [p.chosen_ids for p in kept] == [[0], [2]]
    assert dropped == {"over the request's quota": 1}


def test_no_tenant_brings_more_than_its_quota() -> None:
    pairs = [make(n, request=f"r{n}", tenant=tenant, chosen_ids=[n]) for n, tenant in enumerate("aababb")]
    kept, dropped = dedupe(pairs, Quota(per_tenant=2))
    assert [p.chosen_ids for p in kept] == [[0], [1], [2], [4]]
    assert dropped == {"over the tenant's quota": 2}


def test_files_round_trip_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs([make(1), make(2)], path)
    assert read_pairs(path) == [make(1), make(2)]
    path.write_text(path.read_text() + "{torn\n")
    with pytest.raises(UserError, match="line 3"):
        read_pairs(path)
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "nothing.jsonl")
