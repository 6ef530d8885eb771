"""Reasoning quality: shares, paired changes, and the conversation that a task is asked in."""

from __future__ import annotations

from align.quality import Attempt, messages, quality_change, share, share_by_kind
from align.tasks import SHOT_SETS, SHOTS, built_in

#: Tasks until the sets of solved ones come round: eight kinds.
SETS = 8 * SHOT_SETS


def test_shares_and_the_paired_change() -> None:
    tasks = built_in(16)
    before = [Attempt(task, solved=i < 8, answered=False) for i, task in enumerate(tasks)]
    after = [Attempt(task, solved=4 <= i < 8, answered=False) for i, task in enumerate(tasks)]
    assert (share(before).rate, share(before).n) == (0.5, 16)
    moved = quality_change(before, after)
    assert (moved.rate, moved.n) == (-0.25, 16)
    assert quality_change(before, before).lo == quality_change(before, before).hi == 0.0
    right = [Attempt(task, solved=True, answered=i < 2) for i, task in enumerate(tasks)]
    assert quality_change(before, right, "answered").rate == share(right, "answered").rate == 0.125
    kinds = share_by_kind(before)
    assert list(kinds)[:2] == ["addition", "subtraction"]
    assert {(rate.rate, rate.n) for rate in kinds.values()} == {(0.5, 2)}
    # Three seeds of one task are one case with three replies.
    assert share(before * 3).lo == share(before).lo


def test_tasks_behind_the_same_solved_ones_are_one_case() -> None:
    tasks = built_in(2 * SETS)
    assert [task.shots for task in tasks[:SETS]] == [task.shots for task in tasks[SETS:]]
    before = [Attempt(task, solved=i % SETS < 12, answered=False) for i, task in enumerate(tasks)]
    after = [Attempt(task, solved=i % SETS < 9, answered=False) for i, task in enumerate(tasks)]
    assert share(before).rate == 0.25
    assert (share(before).lo, share(before).hi) == (share(before[:SETS]).lo, share(before[:SETS]).hi)
    assert quality_change(before, after).lo == quality_change(before[:SETS], after[:SETS]).lo


def test_the_shots_are_turns_with_reasoning() -> None:
    task = built_in(1)[0]
    turns = messages(task, "<think>", "</think>")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * SHOTS + ["user"]
    shot = task.shots[0]
    assert turns[1]["content"] == f"<think>\n{shot.thought}\n</think>\n{shot.answer}"
    assert turns[-1]["content"] == task.prompt
