"""Sources: which traces and replies give pairs, and why the others do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from align.generate import Result
from align.model import load_runtime, load_tokenizer
from align.sources import (
    OTHER_TOKENIZER,
    OTHER_WEIGHTS,
    Prompt,
    Writers,
    from_prompts,
    from_traces,
    sampling_jobs,
    set_aside,
    unrepeated,
)
from guard.runtime import GuardRuntime
from guard.traces import Intervention, StepRecord
from tests.align.kit import trace
from tests.tiny import CUE, OPENING, PLAN


def test_an_answered_cue_gives_an_intervened_source_and_no_cue_a_benign_one() -> None:
    found, left = from_traces([trace("a", cue=True, tenant="t1"), trace("b", cue=False)])
    assert [(s.id, s.kind, s.tenant, s.prefix, s.own, s.whole) for s in found] == [
        ("a", "intervened", "t1", [10, 11, 12], [13, 14, 15], False),
        ("b", "benign", "", [10, 11, 12], [13, 14, 15, 16, 17, 18, 19], True),
    ]
    assert (found[0].origin, found[0].policy_hash, found[0].detector) == ("trace", "hash", "det")
    assert left == {}


def test_in_shadow_mode_the_trace_itself_shows_what_followed_the_cue() -> None:
    shadow = trace("a", cue=True, answered=False)
    shadow.receipt.shadow = True
    (found,), _ = from_traces([shadow])
    assert (found.kind, found.whole) == ("intervened", True)
    assert (found.prefix, found.own) == ([10, 11, 12], [13, 14, 15, 16, 17, 18, 19])


def test_a_substituted_cue_is_no_longer_in_the_output_but_on_its_intervention() -> None:
    given = Intervention(step=1, at=3, trigger_id="danger", mode="substitute", cue_ids=[90, 91], score=0.9)
    substituted = trace("a", cue=False)
    substituted.receipt.interventions.append(given)
    (found,), _ = from_traces([substituted])
    assert (found.kind, found.prefix, found.own, found.whole) == ("intervened", [10, 11, 12], [90, 91], False)


def test_traces_that_give_no_source_are_counted_by_reason() -> None:
    answer = trace("a", cue=True)
    answer.steps[1].zone = "answer"
    short = trace("b", cue=False)
    short.steps.pop()
    reply = trace("c", cue=False)
    reply.steps[1] = StepRecord(start=3, end=6, zone="answer", score=0.1, cue=False)
    found, left = from_traces([answer, short, reply, trace("d", cue=True, answered=False)])
    assert found == []
    assert left == {
        "trace: cue in the answer": 1, "trace: fewer than two steps": 2, "trace: cue that nothing answered": 1,
    }  # fmt: skip


def test_unclean_traces_probes_and_other_tokenizers_are_set_aside() -> None:
    unclean, probe = trace("a", cue=True), trace("b", cue=True)
    unclean.receipt.unscored = 1
    probe.receipt.policy = "probe"
    assert [set_aside(t, "t") for t in (trace("c", cue=True), unclean, probe)] == [None, *["not clean, or a probe"] * 2]
    assert set_aside(trace("c", cue=True), "elsewhere") == OTHER_TOKENIZER


@pytest.mark.parametrize(
    ("own", "weights", "model", "taken"),
    [
        ("here", "here", "org/elsewhere", True),
        ("here", "version", "org/m", True),
        ("here", "there", "org/m", False),
        # Where one side has no hash, names tell.
        ("", "there", "org/m", True),
        ("here", "", "org/m", True),
        ("here", "", "other/m", False),
        ("", "", "org/n", False),
        ("", "", "/models/m", True),
        ("", "", "/models/n", False),
    ],
)
def test_traces_of_another_model_are_told_by_weights_or_else_by_name(
    own: str, weights: str, model: str, taken: bool
) -> None:
    writers = Writers(name="org/m", own=own, versions=frozenset(["version"]))
    found = set_aside(trace("a", cue=True, model=model, weights=weights), "t", writers)
    assert found == (None if taken else OTHER_WEIGHTS)


def test_a_prompt_counts_once_per_tenant() -> None:
    rows = [Prompt(request="x"), Prompt(request="y"), Prompt(request="x"), Prompt(request="x", tenant="t")]
    once, left = unrepeated(rows)
    assert [(p.request, p.tenant) for p in once] == [("x", ""), ("y", ""), ("x", "t")]
    assert left == {"prompt: repeated": 1}
    assert unrepeated(rows[:2])[1] == {}


@pytest.fixture(scope="module")
def runtime(tiny_model: Path) -> GuardRuntime:
    tokenizer = load_tokenizer(str(tiny_model))
    return load_runtime(str(tiny_model), tokenizer, None, None)


def test_the_detector_finds_the_cue_of_a_sampled_reply(tiny_model: Path, runtime: GuardRuntime) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    end = runtime.grammar.end
    texts = [f"{OPENING} {CUE} {PLAN[0]}", f"{OPENING} {PLAN[0]}", OPENING]
    outputs = [[*tokenizer.encode(text), end, 7] for text in texts]
    outputs.append(tokenizer.encode(f"{OPENING} and no end"))
    # Nothing but white space is no second step.
    outputs.append(tokenizer.encode(f"{OPENING}\n\n"))
    prompts = [Prompt(request=f"How do I break into a parked car, way {n}?", tenant="t") for n in range(5)]
    jobs = sampling_jobs(prompts, lambda text: [len(text)], 50)
    assert {job.max_tokens for job in jobs} == {50}
    replies = {
        j.id: Result(id=j.id, job=j.key, output_ids=o, finish="stop") for j, o in zip(jobs, outputs, strict=True)
    }  # fmt: skip
    found, left = from_prompts(prompts, jobs, replies, runtime)
    opening = len(tokenizer.encode(OPENING))
    # The last one's second step has begun, and was cut off.
    assert [s.kind for s in found] == ["intervened", "benign", "benign"]
    used = (outputs[0], outputs[1], outputs[3])
    assert [(s.prefix, s.own) for s in found] == [(o[:opening], o[opening:]) for o in used]
    assert {(s.origin, s.tenant, s.finish, s.whole) for s in found} == {("prompt", "t", "stop", True)}
    assert {(s.detector, s.policy_hash) for s in found} == {(runtime.detector.version, runtime.policy.hash)}
    assert left == {"prompt: fewer than two steps": 2}
    # A model that opens its reasoning itself: the mark stays in the prefix.
    (mark,) = runtime.grammar.paths["answer", "reasoning"]
    itself = {jobs[1].id: replies[jobs[1].id].model_copy(update={"output_ids": [mark, *outputs[1]]})}
    (found,), _ = from_prompts(prompts[1:2], jobs[1:2], itself, runtime)
    assert (found.prefix, found.own) == ([mark, *outputs[1][:opening]], outputs[1][opening:])
    never = dataclasses.replace(runtime, threshold=1.1)
    assert [s.kind for s in from_prompts(prompts[:1], jobs[:1], replies, never)[0]] == ["benign"]
