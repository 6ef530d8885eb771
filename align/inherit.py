"""The base model's replies are measured once: a weekly run takes over what an earlier one has of them.

Every version is held against the model as it came, on the same requests, week after week. What that model replied does
not change while its weights, the policy, the detector and the judge are the same; each reply carries the key of the job
that it answers (`align.generate.Job`), so that other requests, or another length, are asked anew.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from align.arms import base_arms
from align.claims import Card, Parts, read_card
from align.disk import write_whole
from align.evaluate import EvalRequest, arm_jobs
from align.generate import Job, answers
from guard.errors import UserError
from guard.traces import Spool, read_traces

if TYPE_CHECKING:
    from align.pipeline import Workbench

#: Under `OUT/evaluation`: what the model as it came replied, and what it said after the controls' sentences.
REPLIES, CONTROLS = "base.jsonl", "controls.jsonl"


class Inherited(BaseModel):
    """`OUT/inherited.json`."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """Directory of the run that generated the replies."""
    replies: int


def inherit(bench: Workbench, requests: Sequence[EvalRequest], runs: Iterable[Path]) -> Inherited | None:
    """Copies the base model's replies to these requests, and the traces of the guarded ones, from the first of `runs`
    that has some and was made of the same parts; None where there is none, or where this run has some of its own."""
    evaluation, card = bench.out / "evaluation", bench.out / "inherited.json"
    if (evaluation / REPLIES).exists():
        return read_card(card, Inherited)
    jobs = arm_jobs(base_arms(bench), requests, bench.settings.max_tokens)
    source = next((run for run in runs if _same_parts(run, bench.out) and _answered(run, jobs)), None)
    if source is None:
        return None
    replies = answers(source / "evaluation" / REPLIES, jobs)
    guarded = {job.guard_id for job in jobs if job.guard and job.id in replies}
    spool = Spool(evaluation / "spool")
    for trace in read_traces(source / "evaluation" / "spool")[0]:
        if trace.guard_id in guarded:
            spool.append(trace)
    if (source / "evaluation" / CONTROLS).exists():
        shutil.copy(source / "evaluation" / CONTROLS, evaluation / CONTROLS)
    found = Inherited(run=_origin(source), replies=len(replies))
    write_whole(card, found.model_dump_json(indent=1))
    # Last: it says that all is here, also to a run that was killed in between.
    write_whole(evaluation / REPLIES, "".join(reply.model_dump_json() + "\n" for reply in replies.values()))
    return found


def _same_parts(run: Path, out: Path) -> bool:
    """Whether both were made of the same parts. A hub name's weights may be unknown still: then nobody knows."""
    parts = read_card(out / "parts.json", Parts)
    return parts is not None and bool(parts.weights) and _card(run / "parts.json", Parts) == parts


def _answered(run: Path, jobs: Sequence[Job]) -> bool:
    return (run / "evaluation" / "spool").is_dir() and bool(answers(run / "evaluation" / REPLIES, jobs))


def _origin(run: Path) -> str:
    """The run that generated them: `run` may have taken them over itself."""
    card = _card(run / "inherited.json", Inherited)
    return str(run) if card is None else card.run


def _card(path: Path, kind: type[Card]) -> Card | None:
    """An earlier run's card. One that another version of the program wrote must not stop cron: it counts as none."""
    with contextlib.suppress(UserError):
        return read_card(path, kind)
    return None
