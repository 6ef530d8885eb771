"""What pairs are made from: reasonings in token ids, each with the step at which a better one may part from it.

A trace with an intervention, a shadow-mode trace with a cue, or a sampled reply to a prompt of which the detector finds
the cue, gives an *intervened* source (paper, section 4); one without any cue gives a *benign* source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from align.cues import Watched, first_cues
from align.generate import Job, Result
from guard.runtime import GuardRuntime
from guard.steps import StepSplitter
from guard.traces import StepRecord, Trace

OTHER_TOKENIZER = "of another tokenizer"
Kind = Literal["intervened", "benign"]
Origin = Literal["trace", "prompt"]


class Prompt(BaseModel):
    """A request to sample reasoning for, and who would ask it."""

    model_config = ConfigDict(extra="ignore")

    request: str = Field(min_length=1)
    tenant: str = ""

    @property
    def id(self) -> str:
        """Stable over the order of a file, so that an extended file resumes."""
        return "prompt-" + hashlib.sha256(f"{self.tenant}\x00{self.request}".encode()).hexdigest()[:16]


class Source(BaseModel):
    """One reasoning. `start`, `end` are output indices, half open: what is cut out is `output_ids[start:end]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """The trace's guard id, or the prompt's id."""
    origin: Origin
    kind: Kind
    tenant: str
    request: str
    prompt_ids: list[int]
    output_ids: list[int]
    start: int
    """The divergence: where the cue begins, or the second step of a benign source."""
    end: int
    """Where the cue ends, or where the output does when `whole`."""
    whole: bool
    """The output goes on unguarded after `start`: nothing has to be generated for the side that it gives."""
    finish: str | None = None
    """Why the output ended (vLLM's word); a trace does not say."""
    policy_hash: str
    detector: str
    """Version of the detector that found the cue, or none."""


def set_aside(trace: Trace, tokenizer_hash: str) -> str | None:
    """Why a trace is not used at all, or None: its ids mean something else here, or the guard did not do its work."""
    if trace.tokenizer_hash != tokenizer_hash:
        return OTHER_TOKENIZER
    return None if trace.receipt.clean and trace.receipt.policy != "probe" else "not clean, or a probe"


def from_traces(traces: Iterable[Trace]) -> tuple[list[Source], Counter[str]]:
    """Sources of the traces in their order, and why the others give none."""
    found: list[Source] = []
    left: Counter[str] = Counter()
    for trace in traces:
        placed = _place(trace)
        if isinstance(placed, str):
            left[f"trace: {placed}"] += 1
            continue
        kind, start, end, whole = placed
        found.append(
            Source(
                id=trace.guard_id, origin="trace", kind=kind, tenant=trace.tenant, request=trace.request,
                prompt_ids=trace.prompt_ids, output_ids=trace.output_ids, start=start, end=end, whole=whole,
                policy_hash=trace.receipt.policy_hash, detector=trace.receipt.detector,
            )
        )  # fmt: skip
    return found, left


def _place(trace: Trace) -> tuple[Kind, int, int, bool] | str:
    """(kind, start, end, whole), or why the trace gives no source."""
    cue = _cue(trace)
    if cue is not None:
        if cue.zone == "answer":
            return "cue in the answer"
        whole = trace.receipt.shadow
        return "intervened", cue.start, len(trace.output_ids) if whole else cue.end, whole
    if any(step.cue for step in trace.steps):
        return "cue that nothing answered"
    if len(trace.steps) < 2 or trace.steps[1].zone == "answer":
        return "fewer than two steps"
    return "benign", trace.steps[1].start, len(trace.output_ids), True


def _cue(trace: Trace) -> StepRecord | None:
    """The first cue that was answered, or would have been (shadow mode: what follows it was not changed)."""
    if trace.receipt.interventions:
        return trace.steps[trace.receipt.interventions[0].step]
    return next((step for step in trace.steps if step.cue), None) if trace.receipt.shadow else None


def unrepeated(prompts: Iterable[Prompt]) -> tuple[list[Prompt], Counter[str]]:
    """Each prompt once, and how many were repeats."""
    rows = list(prompts)
    once = list({prompt.id: prompt for prompt in rows}.values())
    return once, Counter({"prompt: repeated": len(rows) - len(once)} if len(rows) > len(once) else {})


def sampling_jobs(prompts: Sequence[Prompt], render: Callable[[str], list[int]], max_tokens: int) -> list[Job]:
    """One unguarded reply to each prompt."""
    return [Job(id=p.id, prompt_ids=render(p.request), max_tokens=max_tokens) for p in prompts]


def from_prompts(
    prompts: Sequence[Prompt], jobs: Sequence[Job], replies: dict[str, Result], runtime: GuardRuntime
) -> tuple[list[Source], Counter[str]]:
    """Sources of sampled replies, whose cues the detector finds, and why the others give none."""
    outputs = [replies[job.id].output_ids for job in jobs]
    cues = first_cues([Watched(p.request, ids) for p, ids in zip(prompts, outputs, strict=True)], runtime)
    found: list[Source] = []
    left: Counter[str] = Counter()
    for prompt, job, cue in zip(prompts, jobs, cues, strict=True):
        reply = replies[job.id]
        start = _second(reply.output_ids, runtime) if cue is None else cue.start
        if start is None:
            left["prompt: fewer than two steps"] += 1
            continue
        found.append(
            Source(
                id=prompt.id, origin="prompt", kind="benign" if cue is None else "intervened", tenant=prompt.tenant,
                request=prompt.request, prompt_ids=job.prompt_ids, output_ids=reply.output_ids, start=start,
                end=len(reply.output_ids), whole=True, finish=reply.finish, policy_hash=runtime.policy.hash,
                detector=runtime.detector.version,
            )
        )  # fmt: skip
    return found, left


def _second(output: Sequence[int], runtime: GuardRuntime) -> int | None:
    """Where the second reasoning step begins."""
    splitter = StepSplitter(runtime.table, runtime.policy.limits)
    for index, token in enumerate(output):
        if token == runtime.delimiters.end:
            return None
        if splitter.push(token, index) is not None:
            following = output[index + 1 : index + 2]
            return index + 1 if following and following[0] != runtime.delimiters.end else None
    return None
