"""Model Runner V2's token history, from the device to the host without holding the device up; and when it rests."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

LAST = 64
"""Tokens that are fetched of a slot that is given away: more than one step appends."""
REST_SECONDS = 0.25
"""No forward pass takes so long to launch: after it the engine has nothing to do."""


class DeviceHistory:
    """Copies what is new to pinned memory; `wait` waits for these copies alone."""

    def __init__(self, states: LogitsProcRequestState) -> None:
        self._states = states
        self._pin = states.device.type == "cuda"
        self._event = torch.cuda.Event() if self._pin else None  # type: ignore[no-untyped-call]
        self._newest = self.host(2, states.max_num_reqs)
        self._sent = torch.zeros_like(self._newest, device=states.device)
        self._lengths, self._tokens = self._sent[0], self._sent[1, :, None]
        self._places = torch.zeros(states.max_num_reqs, 1, dtype=torch.int64, device=states.device)
        self._last = self._places[:, 0]

    def send_newest(self) -> None:
        """Sends every slot's length (prompt and output, in tokens) and newest token: one copy for the whole batch."""
        # Into memory and views that are there: each operation takes longer to launch than to run.
        torch.clamp(self._states.total_len.gpu, min=1, out=self._lengths)
        torch.sub(self._lengths, 1, out=self._last)
        torch.gather(self._states.all_token_ids.gpu, 1, self._places, out=self._tokens)
        self._newest.copy_(self._sent, non_blocking=True)

    def send_start(self, index: int) -> tuple[int, torch.Tensor]:
        """A new slot's prompt length, and its prompt and earlier output (after a preemption) on their way."""
        prompt, length = (int(each.np[index]) for each in (self._states.prompt_len, self._states.prefill_len))
        return prompt, self._fetch(self._states.all_token_ids.gpu[index, :length])

    def send_last(self, index: int, at: int) -> torch.Tensor:
        """A slot's length and its tokens from position `at` on their way: the slot is about to be given away."""
        tokens = self._states.all_token_ids.gpu[index, at : at + LAST]
        return self._fetch(torch.cat((self._states.total_len.gpu[index : index + 1], tokens)))

    def sent(self) -> None:
        """Everything of this step is on its way."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Waits until it has arrived, which it has once the last step is done."""
        if self._event is not None:
            self._event.synchronize()

    def newest(self) -> tuple[list[int], list[int]]:
        """Length and newest token of every slot."""
        lengths, tokens = self._newest.tolist()
        return lengths, tokens

    def between(self, index: int, start: int, stop: int) -> list[int]:
        """A slot's tokens in a range of positions, however long the device takes."""
        found: list[int] = self._states.all_token_ids.gpu[index, start:stop].tolist()
        return found

    def host(self, *shape: int) -> torch.Tensor:
        """Zeros, int32, that the device can copy to and from by itself."""
        return torch.zeros(shape, dtype=torch.int32, pin_memory=self._pin)

    def _fetch(self, source: torch.Tensor) -> torch.Tensor:
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=self._pin).copy_(source, non_blocking=True)


class Rest:
    """Calls `act` once after each `begin` that no `end` follows within `REST_SECONDS`; dies with its owner."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._since: float | None = None
        threading.Thread(target=_watch, args=(weakref.ref(self), weakref.WeakMethod(act)), daemon=True).start()

    def begin(self) -> None:
        """A step has begun; an empty one never ends."""
        self._since = time.monotonic()

    def end(self) -> None:
        """The step ends."""
        self._since = None

    def due(self) -> bool:
        """Whether it is time to act; True once."""
        since = self._since
        if since is None or time.monotonic() - since < REST_SECONDS:
            return False
        self._since = None
        return True


def _watch(rest: weakref.ref[Rest], act: weakref.WeakMethod[Callable[[], None]]) -> None:
    while True:
        time.sleep(REST_SECONDS / 4)
        owner, method = rest(), act()
        if owner is None or method is None:
            return
        if owner.due():
            method()
        del owner, method
