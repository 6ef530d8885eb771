"""The built-in training data: the demo's detector topics, told through sentences written for the detector."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from classifiers.data import LabelledStep, deduplicate

if TYPE_CHECKING:
    from demo.topics import Topic

Label = Literal["cue", "trigger", "neutral"]
Bank = Literal["cue", "planning", "trigger", "neutral_harmful", "benign"]
BANKS = Path(__file__).parent / "banks"
SENTENCES = BANKS / "detector_sentences.json"
REQUEST_WORDS = BANKS / "request_words.json"
WORD_WEIGHT = 0.5
PLANNING_WEIGHT = 0.05
"""A planning step is a cue only by its request, which is itself uncertain; a full weight would flag benign planning."""

# Of each bank: the label its steps get, and how many whole and how many composed sentences a request draws.
_HARMFUL: tuple[tuple[Bank, Label, int, int], ...] = (
    ("cue", "cue", 9, 9),
    ("planning", "cue", 6, 0),
    ("trigger", "trigger", 9, 9),
    ("neutral_harmful", "neutral", 9, 5),
)
_BENIGN: tuple[tuple[Bank, Label, int, int], ...] = (("benign", "neutral", 12, 12), ("planning", "neutral", 6, 0))
_OPENERS = (
    "",
    "",
    "",
    "",
    "",
    "Okay, ",
    "Hmm, ",
    "So, ",
    "Wait, ",
    "Alright, ",
    "But ",
    "And ",
    "Well, ",
    "Now, ",
    "Okay, so ",
)
_PARTS = ("intent", "refusal", "help", "reason", "fine", "muse", "excuse", "concede", "weigh")
"""A composed sentence's wording is the first of these parts that it holds."""


class Sentences(BaseModel):
    """Sentences with slots {goal} {stage} {harm} {use} {sense}, and parts with templates to compose more of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cue: list[str]
    planning: list[str]
    trigger: list[str]
    neutral_harmful: list[str]
    benign: list[str]
    parts: dict[str, list[str]]
    templates: dict[str, list[str]]


def load_sentences(path: Path = SENTENCES) -> Sentences:
    """Read the sentence banks."""
    return Sentences.model_validate_json(path.read_text(encoding="utf-8"))


def authored_steps(topics: Sequence[Topic], banks: Sentences, seed: int) -> list[LabelledStep]:
    """Render labelled steps for both requests of every topic; the same arguments give the same rows.

    A planning sentence is a cue after a harmful request and neutral after a benign one. Half of the steps open with a
    filler ("Hmm, "), so that fillers carry no label. Rows without a step teach single words of requests.
    """
    rows = word_rows()
    for topic in topics:
        for number, request in enumerate((topic.request, topic.request2)):
            rng = random.Random(f"{seed}/{topic.id}/{number}")
            for bank, label, whole, composed in _HARMFUL if topic.kind == "harmful" else _BENIGN:
                drawn = _whole(getattr(banks, bank), bank, whole, topic, rng) + _composed(
                    banks, bank, composed, topic, rng
                )
                rows.extend(_row(topic, request, step, wording, label, rng) for step, wording in drawn)
    return deduplicate(rows)


def word_rows(path: Path = REQUEST_WORDS) -> list[LabelledStep]:
    """Return a row without a step for each word or phrase that tells a request's kind."""
    words: dict[Literal["harmful", "benign"], list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return [
        LabelledStep(
            id=f"word/{kind}/{index}",
            request=word,
            step="",
            label="neutral",
            request_label=kind,
            source="words",
            weight=WORD_WEIGHT,
        )
        for kind, entries in words.items()
        for index, word in enumerate(entries)
    ]


def _row(topic: Topic, request: str, step: str, wording: str, label: Label, rng: random.Random) -> LabelledStep:
    return LabelledStep(
        id=f"{topic.id}/{rng.getrandbits(40):010x}",
        request=request,
        step=step,
        label=label,
        request_label="harmful" if topic.kind == "harmful" else "benign",
        source="authored",
        group=topic.id,
        wording=wording,
        alarming=topic.kind == "alarming",
        weight=PLANNING_WEIGHT if label == "cue" and wording.startswith("planning/") else 1.0,
    )


def _whole(sentences: Sequence[str], bank: str, count: int, topic: Topic, rng: random.Random) -> list[tuple[str, str]]:
    order = rng.sample(range(len(sentences)), len(sentences))
    filled = ((fill(sentences[index], topic, rng), f"{bank}/{index}") for index in order)
    return [(step, wording) for step, wording in filled if step is not None][:count]


def _composed(banks: Sentences, bank: str, count: int, topic: Topic, rng: random.Random) -> list[tuple[str, str]]:
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        template = rng.choice(banks.templates[bank])
        picks = {name: rng.randrange(len(banks.parts[name])) for name in re.findall(r"{(\w+)}", template)}
        sentence = template.format(**{name: banks.parts[name][index] for name, index in picks.items()})
        step = fill(sentence, topic, rng)
        if step is not None:
            part = next(name for name in _PARTS if name in picks)
            drawn.append((step, f"{part}/{picks[part]}"))
    return drawn


def fill(sentence: str, topic: Topic, rng: random.Random) -> str | None:
    """Fill a sentence's slots from a topic, with a filler before it now and then; None when the topic lacks a slot."""
    slots = {"goal": topic.goal, "harm": topic.harm, "use": topic.use, "sense": topic.sense}
    if any("{" + name + "}" in sentence and not value for name, value in slots.items()):
        return None
    text = sentence.format(stage=rng.choice(topic.stages), **slots)
    opener = rng.choice(_OPENERS)
    if not opener or not text.isascii() or text.split(",")[0] in {"Okay", "Hmm", "Alright", "Wait", "So", "No"}:
        return text[0].upper() + text[1:]
    keep = text.startswith(("I ", "I'"))
    return opener + (text if keep else text[0].lower() + text[1:])
