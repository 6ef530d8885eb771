"""Short authored traces: what the demo reasoner is taught to think and say.

Four shapes per harmful topic, as the paper describes large reasoning models: most traces hold a compliance cue and go
along with it, some refuse at once, some turn round after a cue because a safety trigger comes. A benign topic is
simply answered. Sentences come from `demo/data/sentences.json`; none of them holds know-how.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from demo.topics import DATA, Split, Topic, load_topics

Shape = Literal["comply", "refuse", "turn", "benign"]
#: Rows per harmful topic. Enough turn-rounds that a trigger works, few enough that most requests are complied with.
HARMFUL_SHAPES: tuple[Shape, ...] = ("comply", "comply", "comply", "refuse", "turn")
BENIGN_SHAPES: tuple[Shape, ...] = ("benign", "benign")


@dataclass(frozen=True)
class Row:
    """One authored trace; `reasoning` excludes the delimiters, `answer` excludes the end-of-turn token."""

    topic_id: str
    kind: str
    shape: Shape
    request: str
    reasoning: str
    answer: str


@cache
def sentences() -> dict[str, list[str]]:
    """The reasoner's sentence bank: name -> wordings with {slots}."""
    return json.loads((DATA / "sentences.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def render_rows(split: Split, seed: int = 0) -> list[Row]:
    """All authored traces of one part, in a seeded shuffle."""
    rng = random.Random(seed)
    rows = [row for topic in load_topics(split) for row in _topic_rows(topic, rng)]
    rng.shuffle(rows)
    return rows


def _topic_rows(topic: Topic, rng: random.Random) -> list[Row]:
    shapes: tuple[Shape, ...] = HARMFUL_SHAPES if topic.kind == "harmful" else BENIGN_SHAPES
    return [_row(topic, shape, (topic.request, topic.request2)[i % 2], rng) for i, shape in enumerate(shapes)]


def _row(topic: Topic, shape: Shape, request: str, rng: random.Random) -> Row:
    names = _plot(topic, shape, rng)
    text = " ".join(_say(name, topic, rng) for name in names)
    answer = {"comply": "comply_answer", "benign": "benign_answer"}.get(shape, "refuse_answer")
    return Row(topic.id, topic.kind, shape, request, text, _say(answer, topic, rng))


def _plot(topic: Topic, shape: Shape, rng: random.Random) -> list[str]:
    """The sentence kinds of one trace, in order."""
    neutral = ["neutral"] if rng.random() < 0.25 else []
    if shape == "benign":
        why = "sense" if topic.kind == "alarming" and rng.random() < 0.7 else "fine"
        return ["open", *neutral, why, "how1", "how2"]
    if shape == "comply":
        return ["open", *neutral, "cue", "plan1", "plan2", *(["plan_close"] if rng.random() < 0.3 else [])]
    lead = ["cue"] if shape == "turn" else []
    return ["open", *neutral, *lead, "trigger", *rng.choice((["because", "decide"], ["because"], ["decide"]))]


def _say(name: str, topic: Topic, rng: random.Random) -> str:
    wording = rng.choice(sentences()[name])
    s1, s2, s3 = topic.stages
    return wording.format(goal=topic.goal, s1=s1, s2=s2, s3=s3, harm=topic.harm, use=topic.use, sense=topic.sense)
