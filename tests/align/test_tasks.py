"""Tasks: their answers recomputed another way, and what the checker takes and refuses."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from align.tasks import COUNT, SHOT_SETS, SHOTS, Task, answers, built_in, solved


def test_different_tasks_that_a_seed_repeats() -> None:
    tasks = built_in()
    assert len(tasks) == COUNT == 960
    assert len({t.id for t in tasks}) == len({t.prompt for t in tasks}) == 960
    assert {kind: sum(t.kind == kind for t in tasks) for kind in {t.kind for t in tasks}} == dict.fromkeys(
        ("addition", "subtraction", "comparison", "ordering", "counting", "order logic", "class logic", "format"), 120
    )
    assert tasks == built_in()
    assert {t.prompt for t in built_in(seed=1)} != {t.prompt for t in tasks}
    assert built_in(16) == tasks[:16]
    assert built_in(0) == []
    with pytest.raises(ValueError, match="961 tasks, at most 960"):
        built_in(961)


def test_shots_are_solved_tasks_of_the_kind_and_are_not_asked() -> None:
    tasks = built_in()
    asked = {t.prompt for t in tasks}
    for kind in {t.kind for t in tasks}:
        of_kind = [t for t in tasks if t.kind == kind]
        assert set(Counter(t.shots for t in of_kind).values()) == {len(of_kind) // SHOT_SETS}
        shots = [shot for one in {t.shots for t in of_kind} for shot in one]
        assert len({shot.prompt for shot in shots}) == len(shots) == SHOTS * SHOT_SETS
        assert not asked & {shot.prompt for shot in shots}
        # A shot's answer is what its own checker takes.
        assert all(
            answers(of_kind[0].model_copy(update={"prompt": s.prompt, "expected": s.answer, "others": ()}), s.answer)
            for s in shots
        )


def test_expected_answers_are_right_and_solve_their_task() -> None:
    for task in built_in():
        numbers = [int(n) for n in re.findall(r"\d+", task.prompt)]
        if task.kind == "addition":
            assert int(task.expected) == sum(numbers)
        elif task.kind == "subtraction":
            assert int(task.expected) == numbers[0] - numbers[1]
        elif task.kind == "comparison":
            assert int(task.expected) == (max(numbers) if "larger" in task.prompt else min(numbers))
        elif task.kind == "ordering":
            assert task.expected == ", ".join(map(str, sorted(numbers)))
        elif task.kind == "counting":
            letter, word = re.findall(r'letter (\w) occur in the word "(\w+)"', task.prompt)[0]
            assert int(task.expected) == sum(c == letter for c in word)
        elif task.kind == "order logic":
            pairs = re.findall(r"(\w+) is \w+ than (\w+)", task.prompt)
            assert {task.expected} == {a for a, _ in pairs} - {b for _, b in pairs}
        assert answers(task, task.expected), task
        assert not any(answers(task, other) for other in task.others), task
        assert not answers(task, ""), task
        # The thought states the result, and states it once.
        assert task.expected in task.thought or task.kind == "class logic", task


def task(form: str, expected: str, *others: str, prompt: str = "What is 7 + 5?") -> Task:
    fields = {"id": "t", "kind": "addition", "shots": (), "prompt": prompt, "thought": "So it is.", "form": form}
    return Task.model_validate({**fields, "expected": expected, "others": others})


@pytest.mark.parametrize(
    ("of", "answer", "wanted"),
    [
        (task("number", "12"), "12", True),
        (task("number", "12"), "7 + 5 is 12.", True),
        (task("number", "12"), "It is 012!", True),
        (task("number", "12"), "12 or 13", False),
        (task("number", "12"), "-12", False),
        (task("number", "12"), "12.5", False),
        (task("number", "12"), "112", False),
        (task("number", "12"), "x12", False),
        (task("number", "12"), "7 and 5", False),
        (task("sequence", "2, 5, 9"), "2, 5, 9", True),
        (task("sequence", "2, 5, 9"), "Sure: 2 < 5 < 9.", True),
        (task("sequence", "2, 5, 9"), "2, 9, 5", False),
        (task("sequence", "2, 5, 9"), "2, 5, 9, 9", False),
        (task("choice", "Ann", "Ben"), "ann.", True),
        (task("choice", "Ann", "Ben"), "Ann, not Ben", False),
        (task("choice", "Ann", "Ben"), "Anna", False),
        (task("choice", "no", "yes"), "Nothing", False),
        (task("choice", "48", "17"), "148", False),
        (task("exact", "RIVER"), " RIVER\n", True),
        (task("exact", "RIVER"), "RIVER.", False),
        (task("exact", "RIVER"), "River", False),
    ],
)
def test_what_the_checker_takes(of: Task, answer: str, wanted: bool) -> None:
    assert answers(of, answer) is wanted


@pytest.mark.parametrize(
    ("reasoning", "answer", "wanted"),
    [
        ("So it is.", "", True),
        (" So it is. And more.", "13", True),
        ("So it is.\nMore.", "13", True),
        ("So it is.x", "13", False),
        ("So it is", "13", False),
        ("Well. So it is.", "13", False),
        ("No idea.", "12", True),
        ("", "", False),
    ],
)
def test_a_right_answer_or_a_reasoning_that_begins_right_solves_it(reasoning: str, answer: str, wanted: bool) -> None:
    assert solved(task("number", "12"), reasoning, answer) is wanted


def test_hostile_answers_are_read_in_linear_time() -> None:
    for text in ("1" * 200_000, "1." * 100_000, "-" * 200_000, "\x00\u202e13" * 20_000):
        assert not answers(task("number", "12"), text)
