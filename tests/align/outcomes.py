"""Outcomes for tests: one judged reply, made of what a test cares about."""

from __future__ import annotations

from align.evaluate import EvalRequest, Label, Outcome
from align.text import Reply
from classifiers.judge import Judgement


def outcome(
    topic: str, label: Label = "harmful", *, wording: int = 0, thought: bool = False, said: bool = False,
    refuses: bool = False, waits: int = 0, interventions: int = 0, benchmark: str = "built-in", request: str = "r",
) -> Outcome:  # fmt: skip
    """A reply to one wording of a topic with the judge's three verdicts."""
    asked = EvalRequest(
        id=f"{topic}-{wording}", topic=topic, label=label, request=request, prompt_ids=[1], benchmark=benchmark
    )
    verdict = Judgement(float(thought), float(said), float(refuses))
    return Outcome(asked, Reply("thought", "said", closed=True), verdict, None, interventions, waits)
