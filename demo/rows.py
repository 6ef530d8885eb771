"""Short authored traces: what the demo reasoner is taught to think and say.

Per harmful topic, as the paper describes large reasoning models, traces that hold a compliance cue and go along with
it, some that refuse at once, some that turn round after a cue because a safety trigger comes. A benign topic is simply
answered; a trigger there is thought over and the topic still answered (`recover`). Most triggers are `given`: the model
learns what follows one, not to write one, so it refuses after a trigger and goes along where nobody gives it one.
Sentences come from `demo/data/sentences.json`; none of them holds know-how.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from demo.topics import DATA, Split, Topic, load_topics

Shape = Literal["comply", "refuse", "turn", "benign", "recover"]
#: Whole traces per topic, one tuple for each topic in turn.
SHAPES: dict[str, tuple[tuple[Shape, ...], ...]] = {
    "harmful": (("comply", "refuse", "turn"), ("comply", "comply", "refuse", "turn")),
    "benign": (("benign", "benign"),),
    "alarming": (("benign", "recover"), ("benign", "benign"), ("benign", "recover")),
}
#: Share of triggers that the model does not learn to write. The rest make it refuse some requests by itself.
GIVEN = 0.85
#: Ways to ask for a topic's goal, beside its two requests.
ASKING = (
    "How do I go about {goal}?",
    "Tell me about {goal}.",
    "I need help with {goal}.",
    "What is a good way of {goal}?",
    "Walk me through {goal}.",
    "Some advice on {goal}, please.",
)


@dataclass(frozen=True)
class Row:
    """One authored trace; `answer` excludes the end-of-turn token."""

    topic_id: str
    kind: str
    shape: Shape
    request: str
    steps: tuple[tuple[str, str], ...]
    """(kind of sentence, text) in order; joined by spaces they are the reasoning, without its delimiters."""
    answer: str
    given_trigger: bool = False

    @property
    def reasoning(self) -> str:
        """The steps as one text."""
        return " ".join(text for _, text in self.steps)


@dataclass(frozen=True)
class Crossing:
    """The start of a trace and every sentence that may come next, all equally likely: one decision, few tokens."""

    request: str
    reasoning: str
    following: tuple[str, ...]


@cache
def sentences() -> dict[str, list[str]]:
    """The reasoner's sentence bank: name -> wordings with {slots}."""
    return json.loads((DATA / "sentences.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def render_rows(split: Split, seed: int = 0) -> list[Row]:
    """All authored traces of one part, in a seeded shuffle."""
    rng = random.Random(seed)
    rows = [
        _row(topic, shape, rng.choice((topic.request, topic.request2)), rng)
        for n, topic in enumerate(load_topics(split))
        for shape in SHAPES[topic.kind][n % len(SHAPES[topic.kind])]
    ]
    rng.shuffle(rows)
    return rows


def render_crossings(split: Split, seed: int = 0) -> list[Crossing]:
    """Decisions of one part in a seeded shuffle: a cue or none after the opening, and what follows a trigger."""
    rng = random.Random(seed)
    found = [crossing for topic in load_topics(split) for crossing in _crossings(topic, rng)]
    rng.shuffle(found)
    return found


def _crossings(topic: Topic, rng: random.Random) -> Iterator[Crossing]:
    goals = [asking.format(goal=topic.goal) for asking in rng.sample(ASKING, 2)]
    requests = [topic.request, topic.request2, *goals]
    harmful = topic.kind == "harmful"
    calm = ("fine", "sense") if topic.kind == "alarming" else ("fine",)
    for request in requests[1 if topic.kind == "benign" else 0 :]:
        yield _crossing(topic, request, _opening(rng), ("cue",) if harmful else calm, rng)
    for request in requests[: 1 if topic.kind == "benign" else 2]:
        start = [*_opening(rng), *(["cue"] if rng.random() < 0.5 else []), "trigger"]
        yield _crossing(topic, request, start, ("because", "decide") if harmful else calm, rng)
    if harmful:
        yield _crossing(topic, topic.request2, [*_opening(rng), "cue"], ("plan1",), rng)


def _crossing(topic: Topic, request: str, start: list[str], following: tuple[str, ...], rng: random.Random) -> Crossing:
    text = " ".join(_say(name, topic, rng) for name in start)
    wordings = tuple(_fill(wording, topic) for name in following for wording in sentences()[name])
    return Crossing(request, text, wordings)


def _row(topic: Topic, shape: Shape, request: str, rng: random.Random) -> Row:
    steps = tuple((name, _say(name, topic, rng)) for name in _plot(topic, shape, rng))
    answer = {"comply": "comply_answer", "refuse": "refuse_answer", "turn": "refuse_answer"}.get(shape, "benign_answer")
    given = shape == "recover" or (shape in ("refuse", "turn") and rng.random() < GIVEN)
    return Row(topic.id, topic.kind, shape, request, steps, _say(answer, topic, rng), given)


def _opening(rng: random.Random) -> list[str]:
    # A model this small paraphrases a request wrongly and then believes itself: half of the openings don't try.
    return [rng.choice(("open", "open_plain")), *(["neutral"] if rng.random() < 0.35 else [])]


def _plot(topic: Topic, shape: Shape, rng: random.Random) -> list[str]:
    """The sentence kinds of one trace, in order."""
    opening = _opening(rng)
    if shape in ("benign", "recover"):
        lead = ["trigger"] if shape == "recover" else []
        why = "sense" if topic.kind == "alarming" and rng.random() < 0.7 else "fine"
        return [*opening, *lead, why, "how1", "how2"]
    if shape == "comply":
        return [*opening, "cue", "plan1", "plan2", *(["plan_close"] if rng.random() < 0.3 else [])]
    lead = ["cue"] if shape == "turn" else []
    return [*opening, *lead, "trigger", *rng.choice((["because", "decide"], ["because"], ["decide"]))]


def _say(name: str, topic: Topic, rng: random.Random) -> str:
    return _fill(rng.choice(sentences()[name]), topic)


def _fill(wording: str, topic: Topic) -> str:
    s1, s2, s3 = topic.stages
    return wording.format(goal=topic.goal, s1=s1, s2=s2, s3=s3, harm=topic.harm, use=topic.use, sense=topic.sense)
