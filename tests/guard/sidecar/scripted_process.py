"""The scripted engine as a process of its own, which can be killed. It passes the probe with the trigger it is given.

python -m tests.guard.sidecar.scripted_process PORT SPOOL TRIGGER_ID TOKEN_IDS_AS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvicorn

from guard.policy import Policy
from guard.traces import Intervention, Trace
from tests.guard.sidecar.scripted import WORDS, ScriptedEngine, trace_of


class ProbedEngine(ScriptedEngine):
    """Forces the trigger in a probe, and says its words otherwise."""

    def __init__(self, spool: Path, trigger: str, ids: list[int]) -> None:
        super().__init__(spool, self._written)
        self._trigger, self._ids = trigger, ids
        self.hold.set()

    @property
    def _probed(self) -> bool:
        return "guard_probe" in self.body["vllm_xargs"]

    def _written(self, guard_id: str) -> list[Trace]:
        if not self._probed:
            return [trace_of(guard_id, Policy())]
        done = Intervention(
            step=0, at=1, trigger_id=self._trigger, score=1.0, forced=len(self._ids), completed=True
        )  # fmt: skip
        trace = trace_of(guard_id, Policy(), interventions=[done], injected_tokens=len(self._ids))
        return [trace.model_copy(update={"output_ids": [9, *self._ids, 9]})]

    def _usage(self) -> dict[str, int]:  # type: ignore[override]
        return {"completion_tokens": len(self._ids) + 2 if self._probed else len(WORDS)}


if __name__ == "__main__":
    port, spool, trigger, ids = sys.argv[1:]
    engine = ProbedEngine(Path(spool), trigger, json.loads(ids))
    uvicorn.run(engine.app(), port=int(port), log_level="warning")
