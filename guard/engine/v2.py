"""The guard as a logits processor of vLLM's Model Runner V2, whose token history lies on the device.

What is new is sent to the host before each forward pass, and `apply` waits for that alone. The runner does not say that
a request has ended: its trace is written when its slot is missing from a batch or given away, or the engine rests; one
that comes back is replayed, and its later trace supersedes the first (docs/design/0006).
"""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from guard.engine import params, rows
from guard.engine.forcing import AHEAD, force_plans
from guard.engine.history import DeviceHistory, Rest
from guard.engine.session import EngineGuard

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ENGINE = "vllm-v2"


@dataclass(slots=True)
class _Slot:
    guard_id: str
    args: params.RequestArgs
    prompt: int = 0
    start: torch.Tensor | None = None
    """Prompt and earlier output on their way to the host."""
    row: rows.Row | None = None
    written: bool = False
    """Its trace, and so the monitor has ended."""


class GuardV2(LogitsProcessor):  # type: ignore[misc]  # vLLM is not followed
    """Watches every slot, and forces a trigger token by token after a cue."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._guard = EngineGuard.from_vllm(vllm_config, ENGINE)
        self._history = DeviceHistory(req_states)
        self._plans = self._history.host(req_states.max_num_reqs, AHEAD)
        self._slots: dict[int, _Slot] = {}
        self._new: dict[int, _Slot] = {}
        """Those whose prompt has not been sent for."""
        self._left: list[tuple[_Slot, torch.Tensor]] = []
        """Slots given away, with their last length and token on their way to the host."""
        self._anonymous = (f"anon-{os.getpid()}-{i}" for i in itertools.count())
        self._lock = threading.Lock()
        self._rest = Rest(self._resting)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See `guard.engine.params.validate_params`."""
        params.validate_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Takes a slot over; what its last occupant said last is still in the history."""
        with self._lock:
            old = self._slots.pop(req_idx, None)
            self._new.pop(req_idx, None)
            if old is not None and old.row is not None:
                self._left.append((old, self._history.send_last(req_idx, old.prompt + len(old.row.tokens))))
            args = params.RequestArgs.model_validate(sampling_params.extra_args or {})
            if params.is_warmup(sampling_params) or self._guard.stands_aside(args):
                return False
            self._slots[req_idx] = self._new[req_idx] = _Slot(args.guard_id or next(self._anonymous), args)
            return True

    def apply_staged_writes(self) -> None:
        """Sends every slot's newest token, and the whole history of new ones, to the host; waits for nothing."""
        with self._lock:
            if not (self._slots or self._left):
                return
            self._history.send_newest()
            for index, slot in self._new.items():
                slot.prompt, slot.start = self._history.send_start(index)
            self._new.clear()
            self._history.sent()
            self._rest.begin()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Reads each slot's new tokens, scores finished steps round by round, forces what must come next."""
        with self._lock:
            self._rest.end()
            if not (self._slots or self._left):
                return logits
            here = set(ctx.idx_mapping_np.tolist())
            self._collect(here)
            self._close(self._slots[index] for index in self._slots.keys() - here)
            return self._force(logits, ctx)

    def _collect(self, here: set[int]) -> None:
        """Takes in what `apply_staged_writes` sent, and reads on; a written slot that is in the batch is back."""
        self._history.wait()
        for slot, last in self._left:
            length, *tokens = last.tolist()
            if slot.row is not None:
                self._append(slot, tokens[: max(0, length - slot.prompt - len(slot.row.tokens))])
        self._close(slot for slot, _ in self._left)
        self._left = []
        lengths, newest = self._history.newest()
        for index, slot in self._slots.items():
            if slot.start is not None:
                ids, slot.start = slot.start.tolist(), None
                self._open(slot, ids[: slot.prompt], ids[slot.prompt :])
            row = slot.row
            if row is None:
                continue
            have, length = slot.prompt + len(row.tokens), lengths[index]
            if length == have + 1 and not slot.written:
                row.tokens.append(newest[index])
            elif length > have:
                # Several at once come from accepted drafts, and have to be fetched.
                self._append(slot, self._history.between(index, have, length))
            if slot.written and index in here:
                self._reopen(slot)
        rows.read(self._guard, [slot.row for slot in self._slots.values() if slot.row and not slot.written])

    def _open(self, slot: _Slot, prompt: list[int], tokens: list[int]) -> None:
        slot.row, slot.written = rows.Row(self._guard.open(prompt, slot.guard_id, slot.args), tokens), False

    def _append(self, slot: _Slot, tokens: list[int]) -> None:
        """What follows the tokens that are known."""
        if tokens:
            self._reopen(slot)
            if slot.row is not None:
                slot.row.tokens += tokens

    def _reopen(self, slot: _Slot) -> None:
        if slot.row is not None and slot.written:
            self._open(slot, slot.row.request.prompt, slot.row.tokens)

    def _force(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        live = [(i, row) for i, slot in self._slots.items() if (row := slot.row) and not (row.room or slot.written)]
        plans = {index: plan[:AHEAD] for index, row in live if (plan := row.request.planned)}
        if not plans:
            return logits
        return force_plans(logits, ctx, plans, self._plans)

    def _close(self, slots: Iterable[_Slot]) -> None:
        for slot in slots:
            if slot.row is not None and not slot.written:
                slot.written = True
                rows.finish(self._guard, slot.row)

    def _resting(self) -> None:
        """The last step was empty: all requests have ended."""
        with self._lock:
            self._collect(set())
            self._close(self._slots.values())
