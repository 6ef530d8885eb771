"""Invariants of the monitor over any tokens, and its independence of Python's hash seed."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy import Policy
from tests.guard import kit

CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
START, END = 3, 4
SIZE = len(kit.runtime().table.bytes_of)

TOKENS = st.lists(
    st.one_of(
        st.integers(-3, SIZE + 3),
        st.sampled_from([START, END, 2, *kit.encode(".\n!"), 2**63]),
        st.sampled_from(CALM + CUE),
    ),
    max_size=150,
)
LADDERS = st.lists(st.sampled_from(["trigger", "strong", "refuse", "stop"]), max_size=16).map(tuple)
POLICIES = st.builds(
    Policy, threshold=st.just(0.5), zones=st.sampled_from([("reasoning",), ("answer",), ("reasoning", "answer")]),
    shadow=st.booleans(), ladder=LADDERS, min_step_chars=st.sampled_from([1, 6, 12]),
    max_step_tokens=st.sampled_from([8, 20, 96]), fail_mode=st.sampled_from(["closed", "open"]),
)  # fmt: skip


def any_score(text: str) -> float | None:
    """A pure score that takes every kind of value."""
    return (0.9, 0.1, None, math.nan, 0.5, 7.0)[sum(text.encode()) % 6]


@settings(max_examples=300, deadline=None)
@given(TOKENS, POLICIES, st.sampled_from(["reasoning", "answer"]), st.lists(st.booleans(), min_size=1, max_size=9))
def test_any_tokens_keep_the_invariants(model: list[int], policy: Policy, zone: str, obeys: list[bool]) -> None:
    watcher = kit.monitor(policy, zone=zone)  # type: ignore[arg-type]
    output = kit.generate(watcher, model, any_score, lambda index: obeys[index % len(obeys)])
    receipt = watcher.receipt
    # Every token belongs to at most one step; those of no step are delimiters, unwatched or blank.
    spans = [(s.start, s.end) for s in watcher.steps]
    assert all(a < b for a, b in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    free = set(range(len(output))) - {i for a, b in spans for i in range(a, b)}
    now, table = zone, kit.runtime(policy).table
    for index, token in enumerate(output):
        if now in policy.zones and index in free and token not in (START, END):
            assert table.text([token]).strip() == ""
        now = "answer" if token == END else "reasoning" if token == START else now
    # The receipt counts what the steps say.
    scored = [s for s in watcher.steps if not s.injected]
    assert (receipt.seen, receipt.scored) == (len(scored), sum(s.score is not None for s in scored))
    assert receipt.seen == receipt.scored + receipt.unscored
    assert receipt.injected_tokens == sum(s.end - s.start for s in watcher.steps if s.injected)
    assert len(receipt.interventions) <= (0 if policy.shadow else len(policy.ladder))
    assert [i.rung for i in receipt.interventions] == list(policy.ladder[: len(receipt.interventions)])
    used = [i.trigger_id for i in receipt.interventions if i.rung in ("trigger", "strong")]
    assert len(set(used)) == len(used)
    for item in receipt.interventions:
        cue = watcher.steps[item.step]
        assert cue.cue
        # Nothing stands between the cue's end and the trigger but the delimiter that closed it.
        assert (
            item.at == cue.end
            or output[cue.end : item.at] == [END]
            or not table.text(output[cue.end : item.at]).strip()
        )
    # A replay of the output decides the same.
    again = kit.replay(kit.monitor(policy, zone=zone), output, any_score)  # type: ignore[arg-type]
    assert (again.steps, again.receipt) == (watcher.steps, receipt)


HASH_SEED = """
from tests.guard import kit
for request in ("car", "bread", "这样"):
    watcher = kit.monitor(request=request)
    kit.generate(watcher, kit.encode(" " + kit.CUE) * 5)
    print([i.trigger_id for i in watcher.receipt.interventions])
"""


def test_the_choice_of_triggers_does_not_depend_on_the_hash_seed() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HASH_SEED], cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE, text=True,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    here = []
    for request in ("car", "bread", "这样"):
        watcher = kit.monitor(request=request)
        kit.generate(watcher, CUE * 5)
        here.append(str([i.trigger_id for i in watcher.receipt.interventions]))
    assert first == second == "\n".join(here) + "\n"
    assert len(set(here)) == 3  # requests differ in their triggers
    assert all(line.count(",") == 3 for line in here)  # four interventions each
