"""Invariants of the monitor over any tokens, and its independence of Python's hash seed.

With `tests/guard/engine/test_rows.py` 10,000 cases.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.steps import Zone
from tests.guard import kit
from tests.guard.hostile import CUE, END, OBEYS, ORDINARY, POLICIES, START, TOKENS, ZONES, any_score


@settings(max_examples=4000)
@given(TOKENS, POLICIES, ZONES, OBEYS)
def test_any_tokens_keep_the_invariants(
    model: list[int], policy: Policy, zone: Zone, obeys: Callable[[int], bool]
) -> None:
    watcher = kit.monitor(policy, zone=zone)
    output = kit.generate(watcher, model, any_score, obeys)
    check_spans(watcher, output, zone)
    check_receipt(watcher, output)
    # A replay of the output decides the same.
    again = kit.replay(kit.monitor(policy, zone=zone), output, any_score)
    assert (again.steps, again.receipt) == (watcher.steps, watcher.receipt)


def check_spans(watcher: StepMonitor, output: list[int], zone: Zone) -> None:
    """Every token belongs to at most one step; those of no step are delimiters, unwatched or blank."""
    spans = [(s.start, s.end) for s in watcher.steps]
    assert all(a < b for a, b in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    free = set(range(len(output))) - {i for a, b in spans for i in range(a, b)}
    table, now = kit.runtime().table, zone
    for index, token in enumerate(output):
        if now in watcher.policy.zones and index in free and token not in (START, END):
            assert table.text([token]).strip() == ""
        now = "answer" if token == END else "reasoning" if token == START else now


def check_receipt(watcher: StepMonitor, output: list[int]) -> None:
    """The receipt counts what the steps say, and the policy bounds what was done."""
    receipt, policy = watcher.receipt, watcher.policy
    scored = [s for s in watcher.steps if not s.injected]
    assert (receipt.seen, receipt.scored) == (len(scored), sum(s.score is not None for s in scored))
    assert receipt.seen == receipt.scored + receipt.unscored
    assert receipt.injected_tokens == sum(s.end - s.start for s in watcher.steps if s.injected)
    assert len(receipt.interventions) <= (0 if policy.shadow else len(policy.ladder))
    rungs = iter(policy.ladder)
    assert all(i.rung in rungs for i in receipt.interventions)  # in the ladder's order, some passed over
    used = [i.trigger_id for i in receipt.interventions if i.rung in ("trigger", "strong")]
    assert len(set(used)) == len(used)
    if len(used) < len(kit.runtime(policy).triggers):
        assert [i.rung for i in receipt.interventions] == list(policy.ladder[: len(receipt.interventions)])
    for item in receipt.interventions:
        cue = watcher.steps[item.step]
        between = output[cue.end : item.at]
        assert cue.cue
        # Nothing stands between the cue's end and the trigger but the delimiter that closed it.
        assert between in ([], [END]) or not kit.runtime().table.text(between).strip()


@settings(max_examples=2000)
@given(ORDINARY, POLICIES, ZONES)
def test_no_spelling_of_a_special_token_changes_the_zone(model: list[int], policy: Policy, zone: Zone) -> None:
    watcher = kit.replay(kit.monitor(policy, zone=zone), model, any_score)
    assert {step.zone for step in watcher.steps} <= {zone}
    read = kit.runtime().table.text([t for step in watcher.steps for t in model[step.start : step.end]])
    whole = kit.runtime().table.text(model) if zone in policy.zones else ""
    assert "".join(read.split()) == "".join(whole.split())


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
