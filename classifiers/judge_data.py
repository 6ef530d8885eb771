"""What the judge is trained on: whole outputs, authored for it, and human-labelled completions given by path."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from classifiers.data import read_rows
from classifiers.shapes import REFUSAL
from guard.steps import split_text

if TYPE_CHECKING:
    from demo.rows import Row
    from demo.topics import Topic

SENTENCES = Path(__file__).parent / "banks" / "judge_sentences.json"
EXAMPLE = '{"request": "...", "response": "...", "harmful": 1}'
Banks = dict[str, list[str]]


class JudgedRow(BaseModel):
    """One output with what is known of it; None: not known, so no head learns it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: str
    reasoning: str = ""
    answer: str = ""
    risky: bool | None = None
    reasoning_harm: bool | None = None
    answer_harm: bool | None = None
    refusal: bool | None = None
    group: str
    source: str
    weight: float = Field(default=1.0, gt=0)


class LabelledResponse(BaseModel):
    """A completion with a human's word on it; other fields of the line are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    request: str
    response: str
    harmful: bool
    source: str = "extra"


def read_responses(path: Path, sources: Sequence[str] = ()) -> list[LabelledResponse]:
    """Read human-labelled completions, of these sources only when some are named. Errors: `read_rows`."""
    return [row for row in read_rows(path, LabelledResponse, EXAMPLE) if not sources or row.source in sources]


def from_responses(responses: Iterable[LabelledResponse], weight: float) -> list[JudgedRow]:
    """Turn labelled completions into rows. A harmful one proves its request risky and is no refusal; of the harmless
    ones only those that say so in words count as refusals."""
    return [
        JudgedRow(
            request=row.request,
            answer=row.response,
            risky=True if row.harmful else None,
            answer_harm=row.harmful,
            refusal=False if row.harmful else (True if REFUSAL.search(row.response[:300].lower()) else None),
            group=row.request,
            source=row.source,
            weight=weight,
        )
        for row in responses
    ]


def from_demo(rows: Iterable[Row]) -> list[JudgedRow]:
    """Turn the reasoner's authored traces into rows, each also cut off after its first step, which only restates."""
    found = []
    for row in rows:
        found.append(
            JudgedRow(
                request=row.request,
                reasoning=row.reasoning,
                answer=row.answer,
                risky=row.kind == "harmful",
                reasoning_harm=row.shape == "comply",
                answer_harm=row.shape == "comply",
                refusal=row.shape in {"refuse", "turn"},
                group=row.topic_id,
                source="demo",
            )
        )
        opening = split_text(row.reasoning)[0]
        found.append(
            JudgedRow(request=row.request, reasoning=opening, reasoning_harm=False, group=row.topic_id, source="demo")
        )
    return found


def authored_outputs(topics: Sequence[Topic], seed: int, path: Path = SENTENCES) -> list[JudgedRow]:
    """Compose outputs in many shapes for every topic from the judge's own sentences; seeded."""
    banks: Banks = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for topic in topics:
        rng = random.Random(f"{seed}/judge/{topic.id}")
        writer = _Writer(banks, topic, rng)
        for request in (topic.request, topic.request2):
            shapes = _HARMFUL if topic.kind == "harmful" else _BENIGN
            for name, harm, refusal in shapes:
                rows.append(
                    JudgedRow(
                        request=request,
                        answer=writer.answer(name),
                        risky=topic.kind == "harmful",
                        answer_harm=harm,
                        refusal=refusal,
                        group=topic.id,
                        source="authored",
                    )
                )
            thoughts = _HARMFUL_THOUGHTS if topic.kind == "harmful" else _BENIGN_THOUGHTS
            rows += [
                JudgedRow(
                    request=request,
                    reasoning=writer.thought(plot),
                    reasoning_harm=harm,
                    group=topic.id,
                    source="authored",
                )
                for plot, harm in thoughts
            ]
    return rows


# Shape of an answer, whether it is harmful, whether it declines (None: neither yes nor no).
_HARMFUL: tuple[tuple[str, bool, bool | None], ...] = (
    ("refusal", False, True),
    ("refusal", False, True),
    ("refusal", False, True),
    ("help", True, False),
    ("help", True, False),
    ("list", True, False),
    ("partial", True, False),
    ("persona", True, False),
    ("content", True, False),
    ("long", True, False),
    ("safe_info", False, None),
    ("lecture", False, True),
    ("empty", False, False),
    ("empty", False, False),
)
_BENIGN: tuple[tuple[str, bool, bool | None], ...] = (
    ("help", False, False),
    ("list", False, False),
    ("list", False, False),
    ("help", False, False),
    ("benign_decline", False, True),
    ("empty", False, False),
)
_HARMFUL_THOUGHTS: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("r_open", "r_cue", "r_plan", "r_plan", "r_comply_end"), True),
    (("r_open", "r_weigh", "r_cue", "r_plan", "r_plan", "r_plan"), True),
    (("r_open", "r_plan", "r_plan", "r_plan", "r_comply_end"), True),
    (("r_open", "r_weigh", "r_turn", "r_relapse", "r_plan", "r_plan", "r_comply_end"), True),
    (("r_open", "r_cue"), True),
    (("r_open", "r_cue", "r_turn", "r_refuse"), False),
    (("r_open", "r_cue", "r_plan", "r_turn", "r_weigh", "r_refuse"), False),
    (("r_open", "r_weigh", "r_refuse"), False),
    (("r_open", "r_turn", "r_weigh", "r_refuse", "r_refuse"), False),
    (("r_open", "r_weigh"), False),
    (("r_open",), False),
    (("r_open", "r_restate"), False),
    (("r_restate", "r_restate"), False),
    (("r_open", "r_restate", "r_weigh"), False),
)
_BENIGN_THOUGHTS: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("r_open", "r_fine", "r_plan", "r_plan", "r_plan"), False),
    (("r_open", "r_plan", "r_plan", "r_comply_end"), False),
    (("r_open", "r_fine", "r_plan", "r_comply_end"), False),
    (("r_open", "r_weigh", "r_fine", "r_plan"), False),
    (("r_open", "r_refuse"), False),
    (("r_open",), False),
    (("r_open", "r_restate"), False),
    (("r_restate", "r_fine", "r_explain"), False),
    (("r_open", "r_fine", "r_explain", "r_plan", "r_explain"), False),
)


class _Writer:
    """Composes texts on one topic."""

    def __init__(self, banks: Banks, topic: Topic, rng: random.Random) -> None:
        self._banks, self._topic, self._rng = banks, topic, rng

    def say(self, bank: str) -> str:
        topic = self._topic
        harm = topic.harm or "someone could be hurt"
        use = topic.use or "an answer"
        stage = self._rng.choice(topic.stages)
        slots = {"goal": topic.goal, "harm": harm, "use": use, "stage": stage}
        slots |= {name.capitalize(): value[:1].upper() + value[1:] for name, value in slots.items()}
        return self._rng.choice(self._banks[bank]).format(**slots)

    def thought(self, plot: Sequence[str]) -> str:
        return " ".join(self.say(bank) for bank in plot)

    def answer(self, shape: str) -> str:
        lines = {
            "refusal": lambda: ["refusal", *["refusal_why"] * self._rng.randint(0, 3)],
            "help": lambda: ["help_open", *["help_line"] * self._rng.randint(1, 6), "help_close"],
            "partial": lambda: [
                "partial",
                *["help_line"] * self._rng.randint(2, 8),
                self._rng.choice(["help_close", "refusal_why"]),
            ],
            "persona": lambda: ["persona", *["help_line"] * self._rng.randint(2, 6)],
            "safe_info": lambda: ["safe_info"] * self._rng.randint(1, 3),
            "lecture": lambda: ["refusal", *["refusal_why", "safe_info"] * self._rng.randint(1, 3)],
        }
        if shape == "list":
            return self._list()
        if shape == "long":
            return "\n\n".join([self.say(self._rng.choice(["partial", "persona", "help_open"])), self._list()])
        return " ".join(filter(None, (self.say(bank) for bank in lines.get(shape, lambda: [shape])())))

    def _list(self) -> str:
        style = self._rng.choice(["{}. ", "{}) ", "- ", "* ", "Step {}: ", "**{}.** ", "\n{}. "])
        items = [style.format(number) + self.say("help_line") for number in range(1, self._rng.randint(4, 11))]
        return "\n".join(filter(None, [self.say("help_open"), *items, self.say("help_close")]))
