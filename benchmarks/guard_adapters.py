"""Both adapters of the guard driven without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from benchmarks.guard_rig import MAX_LEN, forget, with_detector
from classifiers.detector import Asked, Detector, RequestContext
from guard.engine.adapter import engine_arguments
from guard.engine.hardware import fast_dtype
from guard.engine.v1 import GuardV1
from guard.engine.v2 import GuardV2

LOGITS = 8
"""Width of the logits: nothing is forced, so it does not matter."""


class NoDetector(Detector):
    """Every step scores 0: what is left is the adapter, the splitter and the monitor."""

    def request(self, *messages: str) -> RequestContext:
        """The least risky context."""
        return RequestContext(np.zeros(1, np.float32), 0.0, 0)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        """Zeros."""
        return np.zeros(len(asked), np.float32)


def engine_config(model: Path, settings: Mapping[str, Any]) -> Any:
    """vLLM's configuration of an engine that loads the guard."""
    return EngineArgs(
        str(model), dtype=fast_dtype(), enforce_eager=True, max_model_len=MAX_LEN, **engine_arguments(dict(settings))
    ).create_engine_config()


class V1Adapter:
    """`GuardV1` as vLLM's V1 runner drives it."""

    def __init__(self, config: Any, detector: Detector, rows: int, tokens: int) -> None:
        self._processor = GuardV1(config, torch.device("cpu"), False)
        self._processor._guard = with_detector(self._processor._guard, detector)
        self._detector = detector
        self._rows: list[list[int]] = []
        self._logits = torch.zeros(0, 0)

    def start(self, prompts: Sequence[list[int]]) -> None:
        """See `benchmarks.guard.Adapter.start`."""
        forget(self._detector)
        self._rows = [[] for _ in prompts]
        self._logits = torch.zeros(len(prompts), LOGITS)
        params = SamplingParams()
        added = [(i, params, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, self._rows, strict=True))]
        self._processor.update_state(BatchUpdate(len(prompts), removed=(), added=added, moved=()))

    def append(self, tokens: Sequence[int]) -> None:
        """See `benchmarks.guard.Adapter.append`."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)

    def step(self) -> None:
        """See `benchmarks.guard.Adapter.step`."""
        self._processor.update_state(None)
        self._processor.apply(self._logits)

    def stop(self) -> None:
        """See `benchmarks.guard.Adapter.stop`."""
        self._processor.update_state(BatchUpdate(0, removed=range(len(self._rows)), added=(), moved=()))


class V2Adapter:
    """`GuardV2` as Model Runner V2 drives it, but for the order of rows, which changes nothing."""

    def __init__(self, config: Any, detector: Detector, rows: int, tokens: int, device: str = "cpu") -> None:
        width, place = tokens + MAX_LEN, torch.device(device)
        host = {name: SimpleNamespace(np=np.zeros(rows, np.int32)) for name in ("prompt_len", "prefill_len")}
        self._states = LogitsProcRequestState(
            device=place, max_num_reqs=rows, vocab_size=LOGITS,
            all_token_ids=SimpleNamespace(gpu=torch.zeros(rows, width, dtype=torch.int32, device=place)),
            total_len=SimpleNamespace(gpu=torch.zeros(rows, dtype=torch.int32, device=place)), **host,
        )  # fmt: skip
        self._processor = GuardV2(config, self._states)
        self._processor._guard = with_detector(self._processor._guard, detector)
        self._detector = detector
        self._logits = torch.zeros(rows, LOGITS, device=place)
        slots = np.arange(rows, dtype=np.int32)
        there, nothing = torch.from_numpy(slots).to(place), torch.zeros(rows, dtype=torch.int32, device=place)
        self._context = LogitsContext(
            expanded_idx_mapping=there, idx_mapping=there, idx_mapping_np=slots,
            expanded_local_pos=nothing, input_ids=nothing, pos=nothing, seq_lens_upper_bound_np=slots,
        )  # fmt: skip

    def start(self, prompts: Sequence[list[int]]) -> None:
        """See `benchmarks.guard.Adapter.start`."""
        forget(self._detector)
        for slot, prompt in enumerate(prompts):
            self._processor.add_request(slot, SamplingParams())
            self._states.prompt_len.np[slot] = self._states.prefill_len.np[slot] = len(prompt)
            self._states.all_token_ids.gpu[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
            self._states.total_len.gpu[slot] = len(prompt)
        self.step()

    def append(self, tokens: Sequence[int]) -> None:
        """See `benchmarks.guard.Adapter.append`."""
        lengths = self._states.total_len.gpu
        said = torch.tensor(tokens, dtype=torch.int32, device=lengths.device)
        self._states.all_token_ids.gpu.scatter_(1, lengths.long()[:, None], said[:, None])
        lengths += 1
        if lengths.is_cuda:
            torch.cuda.synchronize()

    def step(self) -> None:
        """See `benchmarks.guard.Adapter.step`."""
        self._processor.apply_staged_writes()
        self._processor.apply(self._logits, self._context)

    def stop(self) -> None:
        """See `benchmarks.guard.Adapter.stop`."""
        self._processor.apply_staged_writes()
        self._processor._resting()
        self._processor._slots.clear()
