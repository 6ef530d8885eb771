"""The V2 adapter over vLLM's own dataclasses, with a runner that plays Model Runner V2 on CPU tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from guard.engine import history, params
from guard.engine.forcing import AHEAD, force_plans
from guard.engine.v2 import ENGINE, GuardV2
from guard.policy import Policy
from tests.guard import kit
from tests.guard.engine.conftest import EOS, only_choice
from tests.guard.engine.runners import SLOTS, VOCAB, V2Runner, fresh_states

ONE = Policy(triggers=("victim",))
(VICTIM,) = kit.runtime(ONE).triggers
T = list(VICTIM.spaced)
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
Make = Callable[..., V2Runner]


def wanted(script: list[int], length: int, policy: Policy | None = None) -> list[int]:
    """What the core makes of the script, as many ids as the runner made."""
    return kit.generate(kit.monitor(policy or ONE), [*script, *[EOS] * 300])[:length]


def check(it: V2Runner, name: str, policy: Policy | None = None) -> None:
    """The trace holds every id, and what the core says about them."""
    trace = it.traces()[name]
    assert trace.output_ids == it.output[name]
    core = kit.replay(kit.monitor(policy or ONE, request="car"), trace.output_ids)
    assert trace.steps == core.steps
    assert trace.receipt == core.receipt.model_copy(update={"engine": ENGINE, "guard_id": name})


def test_a_cue_is_answered_by_the_very_next_token(runner: Make) -> None:
    it = runner(ONE)
    it.add("cue", [*CUE, *CALM])
    it.add("calm", [*CALM, *CALM])
    for _ in range(len(CUE) + len(T) + 4):
        it.step()
    assert it.output["cue"] == [*CUE, *T, *CALM[:4]]
    assert it.output["calm"] == [*CALM, *CALM, *[EOS] * 40][: len(CUE) + len(T) + 4]


def test_a_slot_that_goes_to_another_request_leaves_its_last_token_in_its_trace(runner: Make) -> None:
    it = runner(ONE)
    it.add("old", [*CUE])
    for _ in range(len(CUE) + len(T)):
        it.step()
    it.step()
    it.free_slot("old")
    it.add("new", [*CUE, *CALM])
    assert it.slot_of["new"] == SLOTS - 1, "the same slot"
    for _ in range(len(CUE) + 2):
        it.step()
    assert it.output["old"] == [*CUE, *T, EOS]
    check(it, "old")
    assert it.output["new"] == [*CUE, *T[:2]]


def test_a_slot_missing_from_a_batch_is_written_and_goes_on_when_it_returns(runner: Make) -> None:
    it = runner(ONE)
    it.add("away", [*CUE, *CALM])
    it.add("here", [*CALM, *CALM, *CALM])
    for _ in range(len(CUE) + 2):
        it.step()
    it.step(["here"])
    check(it, "away")
    assert it.traces()["away"].receipt.interventions[0].completed is False
    for _ in range(len(T) + 3):
        it.step()
    it.step(["here"])
    assert it.output["away"] == [*CUE, *T, *CALM[:5]]
    check(it, "away")


def test_the_last_request_is_written_when_the_engine_rests(runner: Make) -> None:
    it = runner(ONE)
    it.add("last", CALM)
    for _ in range(len(CALM) + 1):
        it.step()
    it.free_slot("last")
    it.flush()
    deadline = time.monotonic() + 20
    while "last" not in it.traces() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert it.output["last"] == [*CALM, EOS]
    check(it, "last")


def test_a_preempted_request_is_replayed_in_another_slot(runner: Make) -> None:
    it = runner(ONE)
    it.add("moves", [*CUE, *CALM])
    it.add("stays", [*CALM, *CUE])
    for _ in range(len(CUE) + 3):
        it.step()
    it.free_slot("moves")
    it.step()
    it.free.insert(0, it.free.pop())
    it.add("moves", [])
    for _ in range(len(T) + 2):
        it.step()
    assert it.output["moves"] == [*CUE, *T, *CALM[: len(it.output["moves"]) - len(CUE) - len(T)]]
    it.step(["stays"])
    check(it, "moves")
    assert it.traces()["moves"].receipt.interventions[0].completed


def test_a_request_that_is_off_is_never_touched(runner: Make) -> None:
    it = runner(ONE, allow_off=True)
    it.add("off", CUE, guard_off=True)
    it.add("on", CUE)
    for _ in range(len(CUE) + 2):
        it.step()
    assert it.output["off"] == [*CUE, EOS, EOS]
    assert it.output["on"] == [*CUE, *T[:2]]


def test_without_leave_no_request_can_switch_the_guard_off(runner: Make) -> None:
    it = runner(ONE)
    it.add("off", CUE, guard_off=True)
    for _ in range(len(CUE) + 2):
        it.step()
    assert it.output["off"] == [*CUE, *T[:2]]


def test_a_masked_trigger_token_is_not_forced_and_the_request_ends(runner: Make) -> None:
    it = runner(ONE)
    it.add("x", [*CUE, *CALM, *CALM])
    for _ in range(len(CUE)):
        it.step()
    assert it.step(masked=(T[0],)) == {"x": [CALM[0]]}
    assert it.step() == {"x": [EOS]}
    it.free_slot("x")
    it.add("y", CALM)
    it.step()
    receipt = it.traces()["x"].receipt
    assert (receipt.enforcement_failed, receipt.clean) == (1, False)


def test_broken_weights_are_not_hidden_by_a_forced_token() -> None:
    rows = torch.zeros(2, dtype=torch.int32)
    context: Any = SimpleNamespace(
        expanded_local_pos=rows, expanded_idx_mapping=torch.tensor([0, 1], dtype=torch.int32)
    )
    logits = torch.linspace(-1, 1, 16).reshape(2, 8)
    logits[0, 6] = float("nan")
    before = logits[0].clone()
    forced = force_plans(logits, context, {0: (3,), 1: (5,)}, torch.zeros(2, AHEAD, dtype=torch.int32))
    assert torch.equal(forced[0].nan_to_num(9), before.nan_to_num(9))
    assert only_choice(forced[1]) == 5


def test_a_masked_trigger_token_lets_the_request_go_on_where_the_policy_fails_open(runner: Make) -> None:
    it = runner(ONE.model_copy(update={"fail_mode": "open"}))
    it.add("x", [*CUE, *CALM, *CALM])
    for _ in range(len(CUE)):
        it.step()
    it.step(masked=(T[0],))
    assert it.step() == {"x": [CALM[1]]}


@pytest.mark.parametrize("drafts", [1, 3])
def test_under_drafts_the_plan_stands_in_the_rows_of_one_request(runner: Make, drafts: int) -> None:
    it = runner(ONE)
    it.add("x", [*CUE, *CALM])
    for _ in range(len(CUE) + len(T)):
        it.step(drafts=drafts)
    assert it.output["x"][: len(CUE) + len(T)] == [*CUE, *T]
    it.step([])
    check(it, "x")


def test_drafts_accepted_past_a_cue_end_the_request(runner: Make) -> None:
    # Why `serve` refuses speculative decoding: the cue ends among accepted drafts, and the trigger comes too late.
    it = runner(ONE)
    it.add("x", [*CUE, *CALM])
    it.step(drafts=9)
    it.step(drafts=9)
    assert it.output["x"] == [*CUE, *CALM[:2], EOS]
    it.step([])
    assert it.traces()["x"].output_ids == it.output["x"]
    assert it.traces()["x"].receipt.enforcement_failed == 1


def test_nothing_waits_while_the_batch_is_unchanged(runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    it = runner(ONE)
    it.add("x", [*CALM, *CALM])
    it.step()
    monkeypatch.setattr(history.DeviceHistory, "between", lambda *_: pytest.fail("waited for the device"))
    monkeypatch.setattr(history.DeviceHistory, "send_start", lambda *_: pytest.fail("copied a whole history"))
    for _ in range(5):
        it.step()
    assert it.output["x"] == CALM[:6]


def test_what_the_runner_warms_itself_up_with_does_no_harm(runner: Make) -> None:
    # vLLM takes all slots with requests of its own (0.33: without a prompt), and runs the sampler over them.
    it = runner(ONE)
    for buffer in (it.states.all_token_ids.gpu, it.states.total_len.gpu):
        buffer.zero_()
    for slot in range(SLOTS):
        assert it.processor.add_request(slot, SamplingParams.for_sampler_warmup()) is False
        it.slot_of[f"warm{slot}"], it.script[f"warm{slot}"] = slot, []
    it.processor.apply_staged_writes()
    names = list(it.slot_of)
    logits = torch.randn(SLOTS, VOCAB)
    assert torch.equal(it.processor.apply(logits.clone(), it._context(names, [(name, 0) for name in names])), logits)
    it.slot_of.clear()
    it.add("x", [*CUE, *CALM])
    for _ in range(len(CUE) + len(T)):
        it.step()
    assert it.output["x"] == [*CUE, *T]
    it.close()
    assert list(it.traces()) == ["x"]


def test_no_client_can_pass_for_a_warm_up() -> None:
    warmup = SamplingParams.for_sampler_warmup()
    assert params.is_warmup(warmup)
    with pytest.raises(ValueError, match="min_tokens cannot be used under the guard"):
        params.validate_params(warmup)
    assert not params.is_warmup(SamplingParams(temperature=0.9, top_p=0.9, top_k=50))
    assert not params.is_warmup(SamplingParams(temperature=0.9, top_p=0.9, top_k=50, min_tokens=2))


NO_SHRINK = [Phase.explicit, Phase.generate]
SENTENCES = [CALM, CUE, kit.encode(" " + kit.CUE * 2), kit.encode("x"), kit.encode("?! ")]


@settings(max_examples=60, phases=NO_SHRINK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_what_the_core_gives(runner: Make, data: st.DataObject) -> None:
    it = runner(ONE, seed=data.draw(st.integers(0, 99)))
    parts = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=3)
    drawn = data.draw(st.lists(parts, min_size=1, max_size=6))
    scripts = {f"r{i}": [token for part in script for token in part] for i, script in enumerate(drawn)}
    left = list(scripts)
    for _ in range(data.draw(st.integers(5, 60))):
        running = list(it.slot_of)
        act = data.draw(st.sampled_from(["add", "step", "step", "step", "some", "preempt", "end", "empty"]))
        if act == "add" and left and it.free:
            name = left.pop(0)
            it.add(name, scripts[name])
        elif act == "preempt" and running:
            it.free_slot(running[0])
            left.insert(0, running[0])
        elif act == "end" and running:
            it.free_slot(running[-1])
        elif act == "some" and running:
            it.step(running[: data.draw(st.integers(1, len(running)))])
        elif act == "empty":
            it.flush()
        else:
            it.step()
    it.flush()
    it.processor._resting()
    for name, said in it.output.items():
        assert said == wanted(scripts[name], len(said))
        if said:
            check(it, name)


def test_the_adapter_is_the_one_of_the_runner_that_builds_it(vllm_config: Any) -> None:
    from guard.engine.adapter import Guard
    from guard.engine.v1 import GuardV1

    v1, v2 = (SimpleNamespace(**vars(vllm_config), use_v2_model_runner=flag) for flag in (False, True))
    assert type(Guard(v1, torch.device("cpu"), False)) is GuardV1
    assert type(Guard(v2, fresh_states())) is GuardV2
    with pytest.raises(ValueError, match="loaded by model runner V2, but the engine is configured for V1"):
        Guard(v1, fresh_states())
    with pytest.raises(ValueError, match="loaded by model runner V1, but the engine is configured for V2"):
        Guard(v2, torch.device("cpu"), False)


def test_vllm_loads_the_adapter_for_runner_v2(vllm_config: Any) -> None:
    from vllm.v1.worker.gpu.sample.logits_processor import (
        build_custom_logits_processors,
        build_custom_logits_processors_params_validator,
    )

    from guard.engine.adapter import FQCN

    states, config = fresh_states(), SimpleNamespace(**vars(vllm_config), use_v2_model_runner=True)
    source = SimpleNamespace(**{f.name: getattr(states, f.name) for f in dataclasses.fields(states)})
    (built,) = build_custom_logits_processors(config, source, False, [FQCN])
    assert type(built) is GuardV2
    check_params = build_custom_logits_processors_params_validator([FQCN])
    check_params(SamplingParams(extra_args={"guard_id": "a"}))
    for refused in ({"bad_words": ["x"]}, {"allowed_token_ids": [1]}, {"extra_args": {"guard_id": 3}}):
        with pytest.raises(VLLMValidationError, match=r"under the guard|guard arguments"):
            check_params(SamplingParams(**refused))
