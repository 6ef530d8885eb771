"""The first cue of many outputs at once: the detector reads the n-th step of every output in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align.text import opened
from classifiers.detector import Asked
from guard.runtime import GuardRuntime
from guard.steps import Step, StepSplitter


@dataclass(frozen=True)
class Watched:
    """One output that begins with its reasoning, and what was asked.

    `start`: a step begins at this output index, and none before it counts as a cue (it was dealt with already).
    """

    request: str
    output: Sequence[int]
    start: int = 0


def first_cues(rows: Sequence[Watched], runtime: GuardRuntime) -> list[Step | None]:
    """Of each output the first reasoning step that the detector calls a cue.

    An output leaves the batch at its first cue, so that no step after it is encoded.
    """
    contexts = {request: runtime.detector.request(request) for request in dict.fromkeys(r.request for r in rows)}
    walks = {i: steps(row, runtime) for i, row in enumerate(rows)}
    found: list[Step | None] = [None] * len(rows)
    while walks:
        wave = [(i, *next(walk, (None, ""))) for i, walk in walks.items()]
        live = [(i, step, before) for i, step, before in wave if step is not None]
        asked = [Asked(contexts[rows[i].request], step.text, before) for i, step, before in live]
        for (i, step, _), score in zip(live, runtime.detector.score_batch(asked) if asked else (), strict=True):
            if score >= runtime.threshold:
                found[i] = step
        walks = {i: walks[i] for i, _, _ in live if found[i] is None}
    return found


def steps(row: Watched, runtime: GuardRuntime) -> Iterator[tuple[Step, str]]:
    """Reasoning steps from `row.start` on, the unfinished last one too, each with the text of the step before it.

    What a live guard scores: a mark that opens the reasoning belongs to no step.
    """
    splitter = StepSplitter(runtime.table, runtime.policy.limits)
    previous = ""
    first = opened(row.output, runtime.table, runtime.grammar)
    for index, token in enumerate(row.output):
        if index == row.start and (before := splitter.flush()) is not None:
            previous = before.text
        if token == runtime.grammar.end:
            break
        step = splitter.push(token, index) if index >= first else None
        if step is None:
            continue
        if step.start >= row.start:
            yield step, previous
        previous = step.text
    last = splitter.flush()
    if last is not None and last.start >= row.start:
        yield last, previous
