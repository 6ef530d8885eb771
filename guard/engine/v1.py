"""The guard as a logits processor of vLLM's V1 model runner.

Each engine step calls `update_state` before the forward pass with the rows that came, went or moved, and `apply` after
it. Tokens are read in `apply` only: under async scheduling `update_state` sees placeholders (vLLM issue 52461).
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from guard.engine import params, rows
from guard.engine.forcing import FORBIDDEN, FORCED
from guard.engine.session import EngineGuard

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ENGINE = "vllm-v1"
NO_NUMBER = "the model's logits are no numbers"


class GuardV1(LogitsProcessor):  # type: ignore[misc]  # vLLM is not followed
    """Watches every row, and forces a trigger token by token after a cue."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._guard = EngineGuard.from_vllm(vllm_config, ENGINE)
        self._rows: dict[int, rows.Row] = {}
        self._anonymous = (f"anon-{os.getpid()}-{i}" for i in itertools.count())

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See `guard.engine.params.validate_params`."""
        params.validate_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: forcing changes the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows rows as they are removed, added and moved, in that order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._finish(self._rows.pop(index, None))
        for index, sampling, prompt, tokens in batch_update.added:
            self._finish(self._rows.pop(index, None))
            row = self._new_row(sampling, prompt or [], tokens)
            if row is not None:
                self._rows[index] = row
        for source, target, direction in batch_update.moved:
            moving, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if direction is MoveDirectionality.SWAP and other is not None:
                self._rows[source] = other
            elif other is not None:
                self._finish(other)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Reads each row's new tokens, scores finished steps round by round, forces what must come next."""
        if not self._rows:
            return logits
        rows.read(self._guard, self._rows.values())
        for index, row in self._rows.items():
            if row.room:
                continue
            forced = row.request.forced
            if forced is None:
                continue
            # A forced token must not hide that a model's weights are broken: the proof of life would pass on them.
            broken = bool(torch.isnan(logits[index]).any())
            if (broken or logits[index, forced] == FORBIDDEN) and not row.request.broken:
                row.request.refuse_force(NO_NUMBER if broken else "a grammar or mask forbids the next trigger token")
                continue
            logits[index] = FORBIDDEN
            logits[index, forced] = FORCED
        return logits

    def _new_row(self, sampling: SamplingParams, prompt: list[int], tokens: list[int]) -> rows.Row | None:
        """`tokens` is vLLM's own running list of output ids: it grows by itself."""
        args = params.RequestArgs.model_validate(sampling.extra_args or {})
        if self._guard.stands_aside(args):
            return None
        return rows.Row(self._guard.open(prompt, args.guard_id or next(self._anonymous), args), tokens)

    def _finish(self, row: rows.Row | None) -> None:
        """A preempted row comes back as a new row with its old tokens, is replayed, and its later trace supersedes
        this one."""
        if row is not None:
            rows.finish(self._guard, row)
