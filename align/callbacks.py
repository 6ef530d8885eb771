"""What happens beside the training loop: metrics as JSON lines, the time it takes, and the stop when numbers are none
any more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from guard.errors import UserError


class MetricsFile(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Appends what is logged to a file; a run that goes on from a checkpoint drops the lines after it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keeps the lines up to the step where this run starts."""
        if state.is_world_process_zero:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            kept = [line for line in lines if _step(line) <= state.global_step]
            self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """One line: the step and everything that was logged at it."""
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds that the steps before this run took; each checkpoint keeps what led to it."""

    def __init__(self) -> None:
        self.earlier = 0.0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on from the checkpoint, where there is one."""
        self.earlier = state.stateful_callbacks.get(type(self).__name__, {}).get("seconds", 0.0)
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What a checkpoint of this step would hold."""
        seconds = self.earlier + time.monotonic() - self._began
        state.stateful_callbacks[type(self).__name__] = {"seconds": seconds}


class StopOnDivergence(TrainerCallback):  # type: ignore[misc]
    """Ends training before an update that is no number reaches the weights; the checkpoint before it stays."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any) -> None:
        """UserError unless all gradients are finite; a loss that is none leaves none."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise diverged(args, state, f"a gradient of {norm.item()}")


def diverged(args: Any, state: Any, got: str) -> UserError:
    """What to raise when `got` is no number: it names the step and the weights that are still good."""
    kept = max(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
    return UserError(
        f"Training diverged at step {state.global_step + 1}", got=got,
        fix=f"Lower learning_rate. The last good weights are in {kept or 'the model it started from'}",
    )  # fmt: skip


def _step(line: str) -> float:
    """The step of a line; a torn one counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
