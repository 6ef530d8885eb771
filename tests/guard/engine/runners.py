"""Players of both model runners over the real adapters: every request says its script, and what is forced."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from guard.engine.session import EngineGuard
from guard.engine.v2 import GuardV2
from guard.traces import Trace, read_traces
from tests.guard import kit
from tests.guard.engine.conftest import EOS, PROMPT, Batch, only_choice

SLOTS, LENGTH = 4, 256
VOCAB = len(kit.runtime().table.bytes_of)


class Runner(Protocol):
    """What both players can do."""

    output: dict[str, list[int]]
    spool: Path

    @property
    def guard(self) -> EngineGuard:
        """The guard of the adapter that is played."""

    def add(self, name: str, script: list[int], **extra: Any) -> None:
        """Adds a request: its next step says the first id of its script."""

    def step(self) -> object:
        """One engine step: every request says what is forced, else the next id of its script, at last EOS."""

    def say(self, name: str, ids: list[int]) -> None:
        """The engine appends ids of its own to a request."""

    def close(self) -> None:
        """All requests end, and the adapter sees it."""

    def traces(self) -> dict[str, Trace]:
        """What lies in the spool."""


class V1Runner:
    """Plays runner V1: a request stays in the row that it was given."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.spool, self.traces = batch, batch.spool, batch.traces
        self.output: dict[str, list[int]] = {}
        self._scripts: dict[str, Iterator[int]] = {}
        self._rows: dict[str, int] = {}

    @property
    def guard(self) -> EngineGuard:
        """The guard of the adapter that is played."""
        guard: EngineGuard = self.batch.processor._guard
        return guard

    def add(self, name: str, script: list[int], **extra: Any) -> None:
        """Takes the next row."""
        self._scripts[name], self.output[name] = itertools.chain(script, itertools.repeat(EOS)), []
        index = self._rows[name] = len(self._rows)
        self.batch.update(added={index: ({"guard_id": name, **extra}, self.output[name])})

    def step(self) -> None:
        """Every row appends one id."""
        forced = self.batch.forced(len(self._rows))
        for name, index in self._rows.items():
            self.say(name, [forced[index] if index in forced else next(self._scripts[name])])

    def say(self, name: str, ids: list[int]) -> None:
        """Grows the list that the adapter was given."""
        self.output[name] += ids

    def close(self) -> None:
        """Removes all rows."""
        self.batch.update(removed=tuple(self._rows.values()))
        self._rows.clear()


class V2Runner:
    """Plays Model Runner V2: slots from a free list, rows in any order, history on the "device", one sample a row."""

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

    @property
    def guard(self) -> EngineGuard:
        """The guard of the adapter that is played."""
        return self.processor._guard

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
        # vLLM's runner ends requests before it adds others: none goes before its history was written.
        if any(other == name for other, _ in self.todo):
            self.flush()
        self.free.append(self.slot_of.pop(name))

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
            logits[at, self._wish(name, k)] = 5.0
        logits[:, list(masked)] = float("-inf")
        before = logits.clone()
        after = self.processor.apply(logits, self._context(names, rows))
        forced = (after != before).any(dim=1).tolist()
        sampled = {
            row: (only_choice(after[at]) if forced[at] else int(after[at].argmax()), forced[at])
            for at, row in enumerate(rows)
        }
        return {name: self._accept(name, sampled, drafts) for name in names}

    def _wish(self, name: str, ahead: int) -> int:
        return [*self.script[name], *[EOS] * 300][self.free_tokens[name] + ahead]

    def _accept(self, name: str, sampled: dict[tuple[str, int], tuple[int, bool]], drafts: int) -> list[int]:
        drafted = [self._wish(name, k) for k in range(drafts)]
        fresh = []
        for k in range(drafts + 1):
            token, forced = sampled[name, k]
            fresh.append(token)
            self.free_tokens[name] += not forced
            if k < drafts and token != drafted[k]:
                break
        self.say(name, fresh)
        return fresh

    def say(self, name: str, ids: list[int]) -> None:
        """Appends ids to a request's history, whatever was forced."""
        slot, start = self.slot_of[name], len(PROMPT) + len(self.output[name])
        self.states.all_token_ids.gpu[slot, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.states.total_len.gpu[slot] = start + len(ids)
        self.output[name] += ids

    def close(self) -> None:
        """All requests end, and the engine rests."""
        for name in list(self.slot_of):
            self.free_slot(name)
        self.flush()
        self.processor._resting()

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


def fresh_states() -> LogitsProcRequestState:
    """The runner's buffers; as on a device they hold whatever was there before."""
    return LogitsProcRequestState(
        device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=VOCAB,
        all_token_ids=SimpleNamespace(gpu=torch.full((SLOTS, LENGTH), 7, dtype=torch.int32)),
        prompt_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
        prefill_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
        total_len=SimpleNamespace(gpu=torch.full((SLOTS,), 3, dtype=torch.int32)),
    )  # fmt: skip
