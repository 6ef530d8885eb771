"""The guard inside vLLM's V1 model runner: a logits processor over one `StepMonitor` per batch row.

vLLM calls `update_state` before each forward pass with the rows that came, went or moved, and `apply` after it. Tokens
are read in `apply` only: under async scheduling `update_state` sees placeholders (vLLM issue 52461). Forcing a token
writes one logit (1e9) instead of a whole row of -inf: constant cost, and no row is ever left without a finite logit.
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from guard.engine.session import EngineGuard, GuardedRequest

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

ENGINE = "vllm-v1"
FQCN = "guard.engine.v1:GuardLogitsProcessor"
FORCE = 1e9
_NEG_INF = float("-inf")
log = logging.getLogger(__name__)


class RequestArgs(BaseModel):
    """What may travel in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`)."""

    model_config = ConfigDict(extra="ignore", strict=True)

    guard_id: str | None = None
    guard_probe: str | None = None
    guard_off: bool = False
    """Only honoured where the engine was started with `allow_off` (in-process evaluation arms)."""


@dataclass
class _Row:
    request: GuardedRequest
    tokens: list[int]
    """vLLM's own running list of output ids: it grows by itself."""
    read: int = 0


class GuardLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not followed
    """Watches every row, and forces a trigger token by token after a cue."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._guard = EngineGuard.from_vllm(vllm_config, ENGINE)
        self._rows: dict[int, _Row] = {}
        self._anonymous = (f"anon-{os.getpid()}-{i}" for i in itertools.count())

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses guard arguments of the wrong shape (ValueError: HTTP 400)."""
        try:
            RequestArgs.model_validate(sampling_params.extra_args or {})
        except ValidationError as error:
            raise ValueError(f"guard arguments: {error.errors()[0]['msg']}") from error

    def is_argmax_invariant(self) -> bool:
        """False: forcing changes the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows rows as they are removed, added and moved, in that order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._finish(self._rows.pop(index, None))
        for index, params, prompt, tokens in batch_update.added:
            self._finish(self._rows.pop(index, None))
            row = self._new_row(params, prompt or [], tokens)
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
        self._read()
        for index, row in self._rows.items():
            forced = row.request.forced
            if forced is None:
                continue
            if logits[index, forced] == _NEG_INF and not row.request.broken:
                row.request.refuse_force("a grammar or mask forbids the next trigger token")
                continue
            logits[index, forced] = FORCE
        return logits

    def _new_row(self, params: SamplingParams, prompt: list[int], tokens: list[int]) -> _Row | None:
        args = RequestArgs.model_validate(params.extra_args or {})
        if args.guard_off and self._guard.config.allow_off:
            return None
        return _Row(self._guard.open(prompt, args.guard_id or next(self._anonymous), args.guard_probe), tokens)

    def _read(self) -> None:
        """Feeds new tokens; a row whose step is pending waits for the round's batch of scores, then reads on."""
        busy = [row for row in self._rows.values() if row.read < len(row.tokens)]
        while busy:
            waiting = [row for row in busy if self._advance(row)]
            self._guard.score([row.request for row in waiting])
            busy = [row for row in waiting if row.read < len(row.tokens)]

    @staticmethod
    def _advance(row: _Row) -> bool:
        """Observes until a step is pending (True) or the row's tokens are used up (False)."""
        tokens = row.tokens
        while row.read < len(tokens):
            token = tokens[row.read]
            row.read += 1
            if row.request.observe(token):
                return True
        return False

    def _finish(self, row: _Row | None) -> None:
        """The row left the batch: read its last tokens and write its trace. A preempted row comes back as a new row
        with its old tokens, is replayed, and its later trace supersedes this one."""
        if row is None:
            return
        while self._advance(row):
            self._guard.score([row.request])
        self._guard.close(row.request, row.tokens)


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` that load the guard with these settings (see `EngineSettings`)."""
    return {"logits_processors": [FQCN], "additional_config": {"reasonguard": settings}}
