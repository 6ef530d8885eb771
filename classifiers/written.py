"""What the model itself wrote in a trace: triggers left out, the cues whose places they took put back."""

from __future__ import annotations

from guard.cli import Decoder
from guard.traces import Trace


def written_steps(trace: Trace, decode: Decoder) -> list[tuple[int, str]]:
    """The text of each step and its index in the trace (of a cue that was replaced, its trigger's); no empty ones."""
    replaced = {each.step: each.cue_ids for each in trace.receipt.interventions if each.cue_ids}
    found = []
    for index, step in enumerate(trace.steps):
        ids = replaced.get(index, []) if step.injected else trace.output_ids[step.start : step.end]
        if text := decode(ids).strip():
            found.append((index, text))
    return found
