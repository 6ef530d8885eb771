"""The base model's replies are measured once: a weekly run takes over what an earlier one has of them.

Every version is held against the model as it came, on the same requests, week after week. What that model replied does
not change while its weights, the policy, the detector and the judge are the same; each reply carries the key of the job
that it answers (`align.generate.Job`), so that other requests, or another length, are asked anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from align.claims import Parts, read_card
from align.disk import write_whole
from align.generate import read_results
from guard.traces import Spool, read_traces

if TYPE_CHECKING:
    from align.pipeline import Workbench

#: Under `OUT/evaluation`: what the model as it came replied, and what it said after the controls' sentences.
BASE_REPLIES = ("base.jsonl", "controls.jsonl")


class Inherited(BaseModel):
    """`OUT/inherited.json`."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """Directory of the run that generated the replies."""
    replies: int


def inherit(bench: Workbench, runs: Iterable[Path]) -> Inherited | None:
    """Copies the base model's replies, and the traces of the guarded ones, from the first of `runs` that has some and
    was made of the same parts; None where there is none, or where this run has some of its own."""
    evaluation, card = bench.out / "evaluation", bench.out / "inherited.json"
    if (evaluation / BASE_REPLIES[0]).exists():
        return read_card(card, Inherited)
    parts = read_card(bench.out / "parts.json", Parts)
    # A hub name's weights may be unknown still: then nobody knows whose replies those are.
    known = parts is not None and bool(parts.weights)
    source = next((run for run in runs if known and _has(run, parts)), None)
    if source is None:
        return None
    results = read_results(source / "evaluation" / BASE_REPLIES[0])
    answered = {f"{result.id}@{result.job}" for result in results.values()}
    spool = Spool(evaluation / "spool")
    for trace in read_traces(source / "evaluation" / "spool")[0]:
        if trace.guard_id in answered:
            spool.append(trace)
    found = Inherited(run=_origin(source), replies=len(results))
    write_whole(card, found.model_dump_json(indent=1))
    # The first file last: it says that all is here, also to a run that was killed in between.
    for name in reversed(BASE_REPLIES):
        if (source / "evaluation" / name).exists():
            shutil.copy(source / "evaluation" / name, evaluation / f"{name}.part")
            (evaluation / f"{name}.part").rename(evaluation / name)
    return found


def _has(run: Path, parts: Parts | None) -> bool:
    evaluation = run / "evaluation"
    there = (evaluation / BASE_REPLIES[0]).exists() and (evaluation / "spool").is_dir()
    return there and read_card(run / "parts.json", Parts) == parts


def _origin(run: Path) -> str:
    """The run that generated them: `run` may have taken them over itself."""
    card = read_card(run / "inherited.json", Inherited)
    return str(run) if card is None else card.run
