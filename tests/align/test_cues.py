"""First cues of many outputs at once are those of each output by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from align.cues import Watched, first_cues
from align.model import load_runtime, load_tokenizer
from guard.runtime import GuardRuntime
from guard.steps import Step, StepSplitter
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


def alone(output: Sequence[int], request: str, runtime: GuardRuntime) -> Step | None:
    """Step by step with one call of the detector each."""
    splitter = StepSplitter(runtime.table, runtime.policy.limits)
    context, previous = runtime.detector.request(request), ""
    for index, token in enumerate(output):
        if token == runtime.grammar.end:
            return None
        step = splitter.push(token, index)
        if step is None:
            continue
        if runtime.detector.score(context, [step.text], previous)[0] >= runtime.threshold:
            return step
        previous = step.text
    return None


def test_a_batch_finds_what_each_output_holds(runtime: GuardRuntime, tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    pool = [OPENING, CUE, *PLAN, HESITATION, REFUSAL_STEP, *(t.text for t in POOL)]
    rows = []
    for _ in range(40):
        ids = tokenizer.encode(" ".join(rng.choices(pool, k=rng.randrange(6))))
        if rng.random() < 0.3:
            ids.insert(rng.randrange(len(ids) + 1), runtime.grammar.end)
        rows.append(Watched(rng.choice([REQUEST, "How do I bake bread?"]), ids))
    found = first_cues(rows, runtime)
    assert found == [alone(row.output, row.request, runtime) for row in rows]
    assert 5 < sum(step is not None for step in found) < 35
    assert first_cues([], runtime) == []


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
