"""Reasoning tasks whose answers a program checks: is what the model could do before still there?

Generated from a seed, so that a small model can do a part of them and nobody has learned them by heart: arithmetic,
comparison, ordering, counting letters, simple logic, following a format. Each is asked after a few solved ones of its
kind, which show how to think (one sentence that states the result) and how to answer; how well a small model does
depends on which it sees, so each kind has several sets of them. A task is solved by the right answer, or by a reasoning
that begins with the right sentence: the demo model gets that far in a third of them, talks of something else in some of
those, and answers a quarter right. What counts is exact; no model judges.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

TASKS_VERSION = 2
#: Tasks of the built-in set, a multiple of the number of kinds; of some kinds hardly more can be made. At the sampling
#: temperature a model differs from itself by 0.7 points (standard deviation) over three seeds of them, and by 1.4 over
#: three times 240, which cannot tell a change of one point.
COUNT = 960
#: Solved tasks of its kind before each task.
SHOTS = 4
#: Sets of them for each kind, whose tasks take them in turn. More would leave too few tasks of some kinds to ask.
SHOT_SETS = 6

Kind = Literal["addition", "subtraction", "comparison", "ordering", "counting", "order logic", "class logic", "format"]
Form = Literal["number", "choice", "sequence", "exact"]

NAMES = ("Ann", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kurt", "Lena")
WORDS = (
    "river", "garden", "apple", "window", "basket", "letter", "summer", "bottle", "carpet", "dinner", "engine",
    "forest", "guitar", "hammer", "island", "jacket", "kettle", "ladder", "mirror", "needle", "orange", "pepper",
    "rabbit", "saddle", "tunnel", "velvet", "wallet", "yellow", "copper", "banana",
)  # fmt: skip
#: Singular class, the class it belongs to, a class it does not belong to; with articles.
CLASSES = (
    ("a robin", "a bird", "a fish"), ("a trout", "a fish", "a bird"), ("an oak", "a tree", "a flower"),
    ("a tulip", "a flower", "a tree"), ("a hammer", "a tool", "a fruit"), ("a pear", "a fruit", "a tool"),
    ("a violin", "an instrument", "a vehicle"), ("a lorry", "a vehicle", "an instrument"),
)  # fmt: skip
QUALITIES = (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("stronger", "strongest"))


class Draft(NamedTuple):
    """A task as its maker gives it."""

    prompt: str
    thought: str
    """What a solver would think: the result, in one sentence."""
    form: Form
    expected: str
    others: tuple[str, ...] = ()


class Shot(BaseModel):
    """A solved task that stands before another in the same conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    thought: str
    answer: str


class Task(BaseModel):
    """One task and what solves it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: Kind
    shots: tuple[Shot, ...]
    prompt: str
    thought: str
    form: Form
    expected: str
    others: tuple[str, ...] = ()
    """Of a choice: the wrong ones."""


def built_in(count: int = COUNT, seed: int = 0) -> list[Task]:
    """`count` different tasks, at most `COUNT`, the kinds in turn; the same seed gives the same tasks. None of a
    kind's shots is asked."""
    if count > COUNT:
        raise ValueError(f"{count} tasks, at most {COUNT} can be made")
    rng = random.Random(f"tasks-{TASKS_VERSION}-{seed}")
    makers: dict[Kind, Callable[[random.Random], Draft]] = {
        "addition": _addition, "subtraction": _subtraction, "comparison": _comparison, "ordering": _ordering,
        "counting": _counting, "order logic": _order_logic, "class logic": _class_logic, "format": _format,
    }  # fmt: skip
    seen: set[str] = set()

    def draw(kind: Kind) -> Draft:
        while (draft := makers[kind](rng)).prompt in seen:
            pass
        seen.add(draft.prompt)
        return draft

    shots = {kind: [tuple(_shot(draw(kind)) for _ in range(SHOTS)) for _ in range(SHOT_SETS)] for kind in makers}
    found: list[Task] = []
    for number in range(count):
        kind, of_kind = list(makers)[number % len(makers)], number // len(makers)
        found.append(
            Task(
                id=f"{kind.replace(' ', '-')}-{of_kind}", kind=kind, shots=shots[kind][of_kind % SHOT_SETS],
                **draw(kind)._asdict(),
            )
        )  # fmt: skip
    return found


def _shot(draft: Draft) -> Shot:
    return Shot(prompt=draft.prompt, thought=draft.thought, answer=draft.expected)


def solved(task: Task, reasoning: str, answer: str) -> bool:
    """Whether the answer is right, or the reasoning begins with the sentence that states the right result."""
    begun = reasoning.lstrip()
    return answers(task, answer) or begun == task.thought or begun.startswith((f"{task.thought} ", f"{task.thought}\n"))


def answers(task: Task, answer: str) -> bool:
    """Whether the answer is right.

    number: it holds the right number, and of other numbers only those of the question. choice: it names the right one
    and no wrong one. sequence: its numbers are the right ones in the right order. exact: it is the wanted text and
    nothing else.
    """
    if task.form == "exact":
        return answer.strip() == task.expected
    if task.form == "choice":
        return _names(answer, task.expected) and not any(_names(answer, other) for other in task.others)
    numbers = list(_numbers(answer))
    if task.form == "sequence":
        return numbers == list(_numbers(task.expected))
    return task.expected in numbers and set(numbers) - {task.expected} <= set(_numbers(task.prompt))


def _numbers(text: str) -> Iterator[str]:
    """Whole numbers as they are written, without leading zeros; a decimal is one number, a sign belongs to it."""
    for match in re.finditer(r"(?<![\w.])-?[0-9]{1,12}(?:\.[0-9]{1,12})?(?![0-9])", text):
        yield re.sub(r"^(-?)0+(?=[0-9])", r"\1", match.group())


def _names(text: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE) is not None


def _addition(rng: random.Random) -> Draft:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    text = f"What is {a} + {b}? Answer with the number."
    return Draft(text, f"{a} and {b} together make {a + b}.", "number", str(a + b))


def _subtraction(rng: random.Random) -> Draft:
    b, rest = rng.randint(1, 12), rng.randint(1, 12)
    text = f"What is {b + rest} - {b}? Answer with the number."
    return Draft(text, f"{b + rest} minus {b} leaves {rest}.", "number", str(rest))


def _comparison(rng: random.Random) -> Draft:
    a, b = rng.sample(range(2, 100), 2)
    word, best = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    text = f"Which number is {word}, {a} or {b}? Answer with that number only."
    other = a + b - best
    return Draft(text, f"{best} is {word} than {other}.", "choice", str(best), (str(other),))


def _ordering(rng: random.Random) -> Draft:
    numbers = rng.sample(range(1, 30), 3)
    wanted = ", ".join(map(str, sorted(numbers)))
    text = f"Put these numbers in order, smallest first: {', '.join(map(str, numbers))}. Answer with the numbers only."
    return Draft(text, f"In order they are {wanted}.", "sequence", wanted)


def _counting(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    letter = rng.choice(sorted(set(word)))
    text = f'How many times does the letter {letter} occur in the word "{word}"? Answer with a digit.'
    count = word.count(letter)
    return Draft(text, f"The letter {letter} is in {word} {count} times.", "number", str(count))


def _order_logic(rng: random.Random) -> Draft:
    first, second, third = rng.sample(NAMES, 3)
    more, most = rng.choice(QUALITIES)
    facts = [f"{first} is {more} than {second}.", f"{second} is {more} than {third}."]
    rng.shuffle(facts)
    text = f"{' '.join(facts)} Who is the {most}? Answer with the name only."
    return Draft(text, f"The {most} of them is {first}.", "choice", first, (second, third))


def _class_logic(rng: random.Random) -> Draft:
    name = rng.choice(NAMES)
    thing, right, wrong = rng.choice(CLASSES)
    asked, expected = rng.choice(((right, "yes"), (wrong, "no")))
    text = f"{name} draws {thing}. Is {thing} {asked}? Answer with yes or no only."
    thought = f"{thing} is {right}." if expected == "yes" else f"{thing} is {right}, not {wrong}."
    return Draft(text, thought.capitalize(), "choice", expected, ("no" if expected == "yes" else "yes",))


def _format(rng: random.Random) -> Draft:
    word, other = rng.sample(WORDS, 2)
    text, wanted = rng.choice(
        (
            (f'Write the word "{word}" in capital letters and nothing else.', word.upper()),
            (f'Write the words "{word}" and "{other}" with a comma and a space between them, nothing else.',
             f"{word}, {other}"),
            (f'Answer with the single word "{word}", without quotes.', word),
        )
    )  # fmt: skip
    return Draft(text, f"They want {wanted} and nothing else.", "exact", wanted)
