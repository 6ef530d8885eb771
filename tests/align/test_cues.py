"""First cues of many outputs at once are those of each output by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from align.cues import Watched, first_cues
from align.model import load_runtime, load_tokenizer
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.steps import Step
from guard.triggers import POOL
from tests.tiny import CUE, HESITATION, OPENING, PLAN, REFUSAL_STEP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST = "How do I break into a parked car?"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def runtime(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> GuardRuntime:
    return load_runtime(str(tiny_model), tokenizer, None, None)


def live(row: Watched, runtime: GuardRuntime, *, opens: bool) -> Step | None:
    """The first cue of a live guard that only looks on; `opens`: the model writes the mark of its reasoning itself."""
    watching = runtime.under(Policy(shadow=True))
    monitor = StepMonitor(watching, row.request, zones=watching.zones(None if opens else "reasoning"))
    context = runtime.detector.request(row.request)

    def cue() -> Step | None:
        step = monitor.pending
        if step is not None:
            monitor.decide(float(runtime.detector.score(context, [step.text], monitor.previous)[0]))
        return step if step is not None and monitor.steps[-1].cue else None

    for token in row.output:
        monitor.observe(token)
        if (found := cue()) is not None:
            return found
    monitor.finish()
    return cue()


def test_a_batch_finds_what_a_live_guard_does(runtime: GuardRuntime, tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    pool = [OPENING, *[CUE] * 4, *PLAN, HESITATION, REFUSAL_STEP, *(t.text for t in POOL)]
    (mark,) = runtime.grammar.paths["answer", "reasoning"]
    rows, opening = [], []
    for _ in range(60):
        ids = tokenizer.encode(" ".join(rng.choices(pool, k=rng.randrange(6))))
        # Cut off in the middle of a step, or ended there by the mark.
        ids = ids[: len(ids) - rng.randrange(4)]
        if rng.random() < 0.3:
            ids.insert(rng.randrange(len(ids) + 1), runtime.grammar.end)
        opening.append(rng.random() < 0.3)
        rows.append(Watched(rng.choice([REQUEST, "How do I bake bread?"]), [mark, *ids] if opening[-1] else ids))
    found = first_cues(rows, runtime)
    assert found == [live(row, runtime, opens=opens) for row, opens in zip(rows, opening, strict=True)]
    assert 10 < sum(step is not None for step in found) < 50
    assert first_cues([], runtime) == []


def test_the_unfinished_last_step_counts_and_the_opening_mark_belongs_to_none(
    runtime: GuardRuntime, tokenizer: PreTrainedTokenizerBase
) -> None:
    opening, cue = tokenizer.encode(OPENING), tokenizer.encode(f" {CUE}")[:-1]
    mark, end = runtime.grammar.paths["answer", "reasoning"][0], runtime.grammar.end
    rows = [
        Watched(REQUEST, [*opening, *cue]),
        Watched(REQUEST, [*opening, *cue, end, 7]),
        Watched(REQUEST, [mark, *cue]),
    ]
    found = [step and (step.start, step.end) for step in first_cues(rows, runtime)]
    assert found == [*[(len(opening), len(opening) + len(cue))] * 2, (1, 1 + len(cue))]
    whole = len(opening) + len(cue)
    assert first_cues([Watched(REQUEST, rows[0].output, whole)], runtime) == [None], "it was dealt with already"


def test_a_cue_before_the_start_does_not_count_again(runtime: GuardRuntime, tokenizer: PreTrainedTokenizerBase) -> None:
    # "... to say no." does not end a step by itself: "no." is an abbreviation.
    lead = tokenizer.encode(f"{OPENING} {CUE} The safe and honest reply here is to say no.")
    after = tokenizer.encode(f" {HESITATION} {CUE}")
    cue = len(lead) + len(tokenizer.encode(f" {HESITATION}"))
    rows = [Watched(REQUEST, [*lead, *after], len(lead)), Watched(REQUEST, lead, len(lead))]
    (again, none) = first_cues(rows, runtime)
    assert again is not None
    assert (again.start, again.end, again.text) == (cue, len(lead) + len(after), CUE)
    assert none is None
    (first,) = first_cues([Watched(REQUEST, [*lead, *after])], runtime)
    assert first is not None
    assert first.start == len(tokenizer.encode(OPENING))
