"""The proof of life for an engine without our guard: a real cue, by decree, that the sidecar must really replace."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
from collections.abc import AsyncGenerator

from guard.engine.session import PROBE_POLICY
from guard.monitor import StepMonitor
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.sidecar.scoring import Scorer
from guard.sidecar.substitute import Piece, Substitution
from guard.sidecar.upstream import Upstream

_REQUEST = "Say hello."
_TOKENS = 64


async def prove_substitution(upstream: Upstream, runtime: GuardRuntime) -> str | None:
    """None when the engine's first token was replaced by a whole trigger and the engine went on from there.

    ApiError when the engine cannot be asked.
    """
    runtime = dataclasses.replace(runtime, policy=runtime.policy.model_copy(update=PROBE_POLICY))
    prompt, _ = await upstream.render({"messages": [{"role": "user", "content": _REQUEST}]})
    zones = PromptReader(runtime.table, runtime.grammar, (), ()).zones(prompt)
    monitor = StepMonitor(
        runtime, _REQUEST, zones=zones, guard_id=f"probe-{uuid.uuid4().hex}", engine="sidecar", mode="substitute"
    )
    scorer = await Scorer.read(runtime, monitor, _REQUEST)

    async def score(watched: StepMonitor) -> float | None:
        found = await scorer.score(watched)
        first = not watched.receipt.interventions
        return 1.0 if first and found is not None and math.isfinite(found) else found

    async def go_on(ids: list[int], most: int) -> AsyncGenerator[Piece]:
        async with contextlib.aclosing(
            upstream.continue_ids({"prompt": ids, "max_tokens": most, "temperature": 0})
        ) as pieces:
            async for piece in pieces:
                yield piece

    output = Substitution(monitor, prompt, _TOKENS, runtime.eos, go_on, score)
    async for _ in output.released():
        pass
    return _problem(output, runtime)


def _problem(output: Substitution, runtime: GuardRuntime) -> str | None:
    receipt = output.monitor.receipt
    if receipt.errors:
        return f"the guard failed on the probe: {receipt.errors[0]}"
    if receipt.unscored or len(receipt.interventions) != 1:
        return (
            f"the probe left {receipt.unscored} steps unscored and saw {len(receipt.interventions)} interventions "
            "instead of one"
        )
    done = receipt.interventions[0]
    wanted = {t.id: (t.plain, t.spaced, t.opening) for t in runtime.triggers}.get(done.trigger_id, ())
    end = done.at + done.forced
    if not done.completed or tuple(output.output[done.at : end]) not in wanted:
        return "the probe's trigger is not in its output"
    if not done.cue_ids or len(output.output) <= end:
        return "the engine did not go on from the probe's trigger"
    return None
