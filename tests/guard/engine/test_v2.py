"""The V2 adapter over vLLM's own dataclasses, with a runner that plays Model Runner V2 on CPU tensors."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from guard.engine import history
from guard.engine.session import EngineGuard, EngineSettings
from guard.engine.v2 import ENGINE, GuardV2
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.traces import Trace, read_traces
from tests.guard import kit
from tests.guard.engine.conftest import EOS, PROMPT, _NoTemplate

ONE = Policy(triggers=("victim",))
(VICTIM,) = kit.runtime(ONE).triggers
T = list(VICTIM.spaced)
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
SLOTS, LENGTH = 4, 256
VOCAB = len(kit.runtime().table.bytes_of)


class Runner:
    """Plays the runner: slots from a free list, rows in any order, history on the "device", one sample a row."""

    def __init__(self, processor: GuardV2, spool: Path, states: LogitsProcRequestState, seed: int = 0) -> None:
        self.processor, self.spool, self.states = processor, spool, states
        self.free = list(range(SLOTS))
        self.slot_of: dict[str, int] = {}
        self.script: dict[str, list[int]] = {}
        self.output: dict[str, list[int]] = {}
        self.free_tokens: Counter[str] = Counter()
        """Tokens of the script that each request has said."""
        self.rng = random.Random(seed)
        self.todo: list[tuple[str, list[int]]] = []

    def add(self, name: str, script: list[int], **extra: Any) -> None:
        """Queues a request: its next step adds it, with what it generated before a preemption."""
        self.script.setdefault(name, script)
        ids = [*PROMPT, *self.output.setdefault(name, [])]
        slot = self.slot_of[name] = self.free.pop()
        self.todo.append((name, ids))
        # The runner stages the history first and tells the processors before it is written.
        self.processor.add_request(slot, SamplingParams(extra_args={"guard_id": name, **extra}))

    def free_slot(self, name: str) -> None:
        """Finished or preempted: the runner tells nobody."""
        self.free.append(self.slot_of.pop(name))
        self.todo = [(other, ids) for other, ids in self.todo if other != name]

    def flush(self) -> None:
        """Writes what was staged, then `apply_staged_writes`, as each engine step begins."""
        for name, ids in self.todo:
            slot = self.slot_of[name]
            self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(PROMPT), len(ids)
            self.states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.states.total_len.gpu[slot] = len(ids)
        self.todo = []
        self.processor.apply_staged_writes()

    def step(
        self, names: list[str] | None = None, drafts: int = 0, masked: tuple[int, ...] = ()
    ) -> dict[str, list[int]]:
        """One engine step: what each request appended. With drafts the model's own next tokens are drafted."""
        self.flush()
        names = list(self.slot_of) if names is None else names
        self.rng.shuffle(names)
        rows = [(name, k) for name in names for k in range(drafts + 1)]
        logits = torch.zeros(len(rows), VOCAB)
        for at, (name, k) in enumerate(rows):
            logits[at, self._say(name, k)] = 5.0
        logits[:, list(masked)] = float("-inf")
        before = logits.clone()
        after = self.processor.apply(logits, self._context(names, rows))
        assert torch.isfinite(after).any(dim=1).all()
        assert ((after == before) | (after == 1e9)).all()
        sampled = {row: (int(after[at].argmax()), bool(after[at].max() == 1e9)) for at, row in enumerate(rows)}
        return {name: self._accept(name, sampled, drafts) for name in names}

    def _say(self, name: str, ahead: int) -> int:
        return [*self.script[name], *[EOS] * 300][self.free_tokens[name] + ahead]

    def _accept(self, name: str, sampled: dict[tuple[str, int], tuple[int, bool]], drafts: int) -> list[int]:
        drafted = [self._say(name, k) for k in range(drafts)]
        fresh = []
        for k in range(drafts + 1):
            token, forced = sampled[name, k]
            fresh.append(token)
            self.free_tokens[name] += not forced
            if k < drafts and token != drafted[k]:
                break
        slot, start = self.slot_of[name], len(PROMPT) + len(self.output[name])
        self.states.all_token_ids.gpu[slot, start : start + len(fresh)] = torch.tensor(fresh, dtype=torch.int32)
        self.states.total_len.gpu[slot] = start + len(fresh)
        self.output[name] += fresh
        return fresh

    def _context(self, names: list[str], rows: list[tuple[str, int]]) -> LogitsContext:
        slots = np.array([self.slot_of[name] for name in names], np.int32)
        nothing = torch.zeros(len(rows), dtype=torch.int32)
        return LogitsContext(
            expanded_idx_mapping=torch.tensor([self.slot_of[name] for name, _ in rows], dtype=torch.int32),
            idx_mapping=torch.from_numpy(slots), idx_mapping_np=slots,
            expanded_local_pos=torch.tensor([k for _, k in rows], dtype=torch.int32),
            input_ids=nothing, pos=nothing, seq_lens_upper_bound_np=slots,
        )  # fmt: skip

    def traces(self) -> dict[str, Trace]:
        """What lies in the spool."""
        return {trace.guard_id: trace for trace in read_traces(self.spool)[0]}


Make = Callable[..., Runner]


def fresh_states() -> LogitsProcRequestState:
    """The runner's buffers; as on a device they hold whatever was there before."""
    return LogitsProcRequestState(
        device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=VOCAB,
        all_token_ids=SimpleNamespace(gpu=torch.full((SLOTS, LENGTH), 7, dtype=torch.int32)),
        prompt_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
        prefill_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
        total_len=SimpleNamespace(gpu=torch.full((SLOTS,), 3, dtype=torch.int32)),
    )  # fmt: skip


@pytest.fixture
def runner(vllm_config: Any, tmp_path: Path) -> Make:
    """A runner over a real V2 adapter whose policy the test chooses."""

    def make(policy: Policy | None = None, seed: int = 0, **config: Any) -> Runner:
        spool = tmp_path / f"spool-{len(list(tmp_path.iterdir()))}"
        states = fresh_states()
        processor = GuardV2(vllm_config, states)
        runtime = kit.runtime(policy or ONE)
        reader = PromptReader.build(_NoTemplate(), runtime.table, runtime.delimiters)
        processor._guard = EngineGuard(EngineSettings(spool=spool, **config), runtime, reader, ENGINE)
        return Runner(processor, spool, states, seed)

    return make


def wanted(script: list[int], length: int, policy: Policy | None = None) -> list[int]:
    """What the core makes of the script, as many ids as the runner made."""
    return kit.generate(kit.monitor(policy or ONE), [*script, *[EOS] * 300])[:length]


def check(it: Runner, name: str, policy: Policy | None = None) -> None:
    """The trace holds every id, and what the core says about them."""
    trace = it.traces()[name]
    assert trace.output_ids == it.output[name]
    core = kit.replay(kit.monitor(policy or ONE, request="car"), trace.output_ids)
    assert trace.steps == core.steps
    assert trace.receipt == core.receipt.model_copy(update={"engine": ENGINE, "guard_id": name})


def test_a_cue_is_answered_by_the_very_next_token(runner: Make) -> None:
    it = runner()
    it.add("cue", [*CUE, *CALM])
    it.add("calm", [*CALM, *CALM])
    for _ in range(len(CUE) + len(T) + 4):
        it.step()
    assert it.output["cue"] == [*CUE, *T, *CALM[:4]]
    assert it.output["calm"] == [*CALM, *CALM, *[EOS] * 40][: len(CUE) + len(T) + 4]


def test_a_slot_that_goes_to_another_request_leaves_its_last_token_in_its_trace(runner: Make) -> None:
    it = runner()
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
    it = runner()
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
    it = runner()
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
    it = runner()
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
    it = runner(allow_off=True)
    it.add("off", CUE, guard_off=True)
    it.add("on", CUE)
    for _ in range(len(CUE) + 2):
        it.step()
    assert it.output["off"] == [*CUE, EOS, EOS]
    assert it.output["on"] == [*CUE, *T[:2]]


def test_without_leave_no_request_can_switch_the_guard_off(runner: Make) -> None:
    it = runner()
    it.add("off", CUE, guard_off=True)
    for _ in range(len(CUE) + 2):
        it.step()
    assert it.output["off"] == [*CUE, *T[:2]]


def test_a_masked_trigger_token_is_not_forced_and_the_request_ends(runner: Make) -> None:
    it = runner()
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


def test_a_masked_trigger_token_lets_the_request_go_on_where_the_policy_fails_open(runner: Make) -> None:
    it = runner(ONE.model_copy(update={"fail_mode": "open"}))
    it.add("x", [*CUE, *CALM, *CALM])
    for _ in range(len(CUE)):
        it.step()
    it.step(masked=(T[0],))
    assert it.step() == {"x": [CALM[1]]}


@pytest.mark.parametrize("drafts", [1, 3])
def test_under_drafts_the_plan_stands_in_the_rows_of_one_request(runner: Make, drafts: int) -> None:
    it = runner()
    it.add("x", [*CUE, *CALM])
    for _ in range(len(CUE) + len(T)):
        it.step(drafts=drafts)
    assert it.output["x"][: len(CUE) + len(T)] == [*CUE, *T]
    it.step([])
    check(it, "x")


def test_drafts_accepted_past_a_cue_end_the_request(runner: Make) -> None:
    # Why `serve` refuses speculative decoding: the cue ends among accepted drafts, and the trigger comes too late.
    it = runner()
    it.add("x", [*CUE, *CALM])
    it.step(drafts=9)
    it.step(drafts=9)
    assert it.output["x"] == [*CUE, *CALM[:2], EOS]
    it.step([])
    assert it.traces()["x"].output_ids == it.output["x"]
    assert it.traces()["x"].receipt.enforcement_failed == 1


def test_nothing_waits_while_the_batch_is_unchanged(runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    it = runner()
    it.add("x", [*CALM, *CALM])
    it.step()
    monkeypatch.setattr(history.DeviceHistory, "between", lambda *_: pytest.fail("waited for the device"))
    monkeypatch.setattr(history.DeviceHistory, "send_start", lambda *_: pytest.fail("copied a whole history"))
    for _ in range(5):
        it.step()
    assert it.output["x"] == CALM[:6]


NO_SHRINK = [Phase.explicit, Phase.generate]
SENTENCES = [CALM, CUE, kit.encode(" " + kit.CUE * 2), kit.encode("x"), kit.encode("?! ")]


@settings(max_examples=60, phases=NO_SHRINK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_what_the_core_gives(runner: Make, data: st.DataObject) -> None:
    it = runner(seed=data.draw(st.integers(0, 99)))
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
