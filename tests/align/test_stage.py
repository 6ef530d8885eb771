"""What a stage is about before it trains: its rows, its directory, its arguments."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from align import stage
from align.model import render
from align.pairs import Pair, Scope, cut
from align.text import ReplyReader
from align.train import TrainSettings, train
from guard.errors import UserError
from guard.policy import Policy
from tests.align.small import END, LIMITS, SMALL


def test_another_stage_in_the_directory_is_refused(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path
) -> None:
    with pytest.raises(UserError, match="holds another training stage"):
        train(str(small_model), pairs, trained, SMALL.model_copy(update={"beta": 0.2}), reader, LIMITS)
    with pytest.raises(UserError, match="holds no training stage"):
        stage.read(trained.parent)


def test_a_row_is_cut_into_steps_by_the_policys_limits(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    settings = SMALL.model_copy(update={"scope": Scope(steps=1)})
    card = stage.StageCard(model=str(small_model), start=None, settings=settings)
    cut = {}
    for name, limits in (("whole", LIMITS), ("short", Policy(max_step_tokens=8).limits)):
        stage.prepare(tmp_path / name, card, pairs, reader, limits)
        cut[name] = {row.pair: len(row.rejected_ids) for row in stage.read(tmp_path / name)[1]}
    assert max(cut["short"].values()) == 8 < max(cut["whole"].values())


def test_rows_that_are_too_long_are_left_out_and_named(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    long = [pairs[0].model_copy(update={"id": "long", "prefix_ids": pairs[0].prefix_ids * 80}), *pairs]
    stage.prepare(
        tmp_path / "a", stage.StageCard(model=str(small_model), start=None, settings=SMALL), long, reader, LIMITS
    )
    card, rows = stage.read(tmp_path / "a")
    assert card.too_long == ["long"], "the small model knows 512 positions"
    assert len(rows) == 8
    shortest = min(row.length for row in rows)
    settings = SMALL.model_copy(update={"max_length": shortest - 1})
    with pytest.raises(UserError, match=f"8 pairs, 8 of them longer than {shortest - 1} tokens"):
        stage.prepare(
            tmp_path / "b", stage.StageCard(model="tiny", start=None, settings=settings), pairs, reader, LIMITS
        )


def test_benign_pairs_are_trained_on_once_more_behind_others_where_that_is_not_too_long(
    small_model: Path, pairs: list[Pair], tokenizer: Any, reader: ReplyReader, tmp_path: Path
) -> None:
    ended = [
        p.model_copy(update={"prompt_ids": render(tokenizer, p.request), "chosen_ids": [*p.chosen_ids, END]})
        for p in pairs
    ]
    settings = SMALL.model_copy(update={"benign_turns": 0.5, "scope": Scope(steps=1, benign_steps=None)})
    longest = max(len(p.prompt_ids + p.prefix_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in ended)
    rows = {}
    for name, limit in (("all", None), ("short", longest)):
        card = stage.StageCard(
            model=str(small_model), start=None, settings=settings.model_copy(update={"max_length": limit})
        )
        stage.prepare(tmp_path / name, card, ended, reader, LIMITS)
        card, rows[name] = stage.read(tmp_path / name)
        assert card.asked_again == len(rows[name]) - 8
    assert Counter(row.kind for row in rows["all"]) == {"benign": 6, "intervened": 4}
    behind = [row for row in rows["all"] if row not in rows["short"]]
    assert len(behind) == 2
    for row in behind:
        single = next(r for r in rows["short"] if r.pair == row.pair)
        assert row.chosen_ids == single.chosen_ids
        assert row.prompt_ids[-len(single.prompt_ids) :] == single.prompt_ids
        assert row.prompt_ids.count(END) > single.prompt_ids.count(END) + 1, "the other exchange is whole"
    assert [row for row in rows["all"] if row not in behind] == rows["short"]


@pytest.mark.parametrize(("share", "counted"), [(0.5, (4, 4, 4)), (0.0, (4, 0, 4))])
def test_intervened_pairs_are_trained_on_once_more_against_a_benign_reply(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path, share: float, counted: tuple[int, ...]
) -> None:
    """In a stage without benign pairs too: those that it leaves out are the other sides."""
    settings = SMALL.model_copy(update={"contrast": 1.0, "benign_share": share, "scope": Scope(steps=1)})
    stage.prepare(
        tmp_path / "a", stage.StageCard(model=str(small_model), start=None, settings=settings), pairs, reader, LIMITS
    )
    card, rows = stage.read(tmp_path / "a")
    kinds = Counter(row.kind for row in rows)
    assert (kinds["intervened"] - card.contrasted, kinds["benign"], card.contrasted) == counted
    against = cut(pairs[0].chosen_ids, 1, reader.table, LIMITS)
    twice = [(first, second) for first, second in pairwise(rows) if first.pair == second.pair]
    assert len(twice) == 4
    assert all(second == first.model_copy(update={"rejected_ids": against}) for first, second in twice)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"report_to": ["wandb"]}, "Tracker wandb is not installed"),
        ({"batch_size": 5, "micro_batch": 2}, "batch_size does not split; got 5 pairs over 1 processes of 2"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(tmp_path: Path, changed: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        stage.arguments(TrainSettings(**changed), tmp_path)
