"""Reasoning quality: shares, paired changes, and the conversation that a task is asked in."""

from __future__ import annotations

from align.quality import Attempt, messages, quality_change, share, share_by_kind
from align.tasks import SHOTS, built_in


def test_shares_and_the_paired_change() -> None:
    tasks = built_in(16)
    before = [Attempt(task, solved=i < 8, answered=False) for i, task in enumerate(tasks)]
    after = [Attempt(task, solved=4 <= i < 8, answered=False) for i, task in enumerate(tasks)]
    assert (share(before).rate, share(before).n) == (0.5, 16)
    moved = quality_change(before, after)
    assert (moved.rate, moved.n) == (-0.25, 16)
    assert quality_change(before, before).lo == quality_change(before, before).hi == 0.0
    right = [Attempt(task, solved=True, answered=i < 2) for i, task in enumerate(tasks)]
    assert quality_change(before, right, "answered").rate == 0.125
    kinds = share_by_kind(before)
    assert list(kinds)[:2] == ["addition", "subtraction"]
    assert {(rate.rate, rate.n) for rate in kinds.values()} == {(0.5, 2)}
    # Three seeds of one task are one case with three replies.
    assert share(before * 3).lo == share(before).lo


def test_the_shots_are_turns_with_reasoning() -> None:
    task = built_in(1)[0]
    turns = messages(task, "<think>", "</think>")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * SHOTS + ["user"]
    shot = task.shots[0]
    assert turns[1]["content"] == f"<think>\n{shot.thought}\n</think>\n{shot.answer}"
    assert turns[-1]["content"] == task.prompt
