"""What pairs are made from: reasonings in token ids, each with the step at which a better one may part from it.

A trace with an intervention, a shadow-mode trace with a cue, or a sampled reply to a prompt of which the detector finds
the cue, gives an *intervened* source (paper, section 4); one without any cue gives a *benign* source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from align.cues import Watched, first_cues, steps
from align.generate import Job, Result
from guard.runtime import GuardRuntime
from guard.traces import Trace
from guard.weights import weights_hash

OTHER_TOKENIZER = "of another tokenizer"
OTHER_WEIGHTS = "of other weights"
NO_IDS = "no ids kept"
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
    """One reasoning in two parts: what both sides of a pair share, and how it went on by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """The trace's guard id, or the prompt's id."""
    origin: Origin
    kind: Kind
    tenant: str
    request: str
    prompt_ids: list[int]
    prefix: list[int]
    """Output ids before the divergence: before the cue, or before the second step of a benign source."""
    own: list[int]
    """Output ids after it: the cue alone, or everything there is when `whole`."""
    whole: bool
    """Nothing has to be generated for the side that `own` gives: it was not guarded, or there was nothing to guard."""
    finish: str | None = None
    """Why the output ended (vLLM's word); a trace does not say."""
    policy_hash: str
    detector: str
    """Version of the detector that found the cue, or none."""


class Writers(BaseModel):
    """The models whose traces are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Directory or hub name, which tells models apart where the weights of one are not known."""
    own: str
    """The hash of its weights; empty: not known here."""
    versions: frozenset[str] = frozenset()
    """The same of versions that were trained from it."""

    @classmethod
    def of(cls, model: str, versions: Iterable[str] = ()) -> Self:
        """The model, as its files are now."""
        return cls(name=model, own=weights_hash(model), versions=frozenset(versions))

    def wrote(self, trace: Trace) -> bool:
        """Whether a trace is one of theirs."""
        if self.own and trace.weights:
            return trace.weights == self.own or trace.weights in self.versions
        return same_model(trace.model, self.name)


def same_model(one: str, other: str) -> bool:
    """Whether two names may mean one model: equal, or the same last part where one of them is a place on a disk."""
    here = any(name.startswith((".", "/", "~")) or Path(name).is_dir() for name in (one, other))
    return one == other or (here and Path(one).name == Path(other).name)


def set_aside(trace: Trace, tokenizer_hash: str, writers: Writers | None = None) -> str | None:
    """Why a trace is not used at all, or None: its ids mean something else here, another model than the `writers` wrote
    it (None: any may), or the guard did not do its work."""
    if trace.tokenizer_hash != tokenizer_hash:
        return OTHER_TOKENIZER
    if writers is not None and not writers.wrote(trace):
        return OTHER_WEIGHTS
    if trace.log_content == "none":
        return NO_IDS
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
        kind, prefix, own, whole = placed
        found.append(
            Source(
                id=trace.guard_id, origin="trace", kind=kind, tenant=trace.tenant, request=trace.request,
                prompt_ids=trace.prompt_ids, prefix=prefix, own=own, whole=whole,
                policy_hash=trace.receipt.policy_hash, detector=trace.receipt.detector,
            )
        )  # fmt: skip
    return found, left


def _place(trace: Trace) -> tuple[Kind, list[int], list[int], bool] | str:
    """(kind, prefix, own, whole), or why the trace gives no source."""
    output, steps, receipt = trace.output_ids, trace.steps, trace.receipt
    if receipt.interventions:
        first = receipt.interventions[0]
        if first.step < len(steps) and steps[first.step].zone == "answer":
            return "cue in the answer"
        if first.mode == "substitute":
            return "intervened", output[: first.at], first.cue_ids, False
        cue = steps[first.step]
        return "intervened", output[: cue.start], output[cue.start : cue.end], False
    seen = next((step for step in steps if step.cue), None)
    if seen is not None and receipt.shadow and seen.zone == "reasoning":
        # What followed was not changed: the trace itself shows it.
        return "intervened", output[: seen.start], output[seen.start :], True
    if seen is not None:
        return "cue that nothing answered"
    if len(steps) < 2 or steps[1].zone == "answer":
        return "fewer than two steps"
    return "benign", output[: steps[1].start], output[steps[1].start :], True


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
        start = _second(prompt.request, reply.output_ids, runtime) if cue is None else cue.start
        if start is None:
            left["prompt: fewer than two steps"] += 1
            continue
        found.append(
            Source(
                id=prompt.id, origin="prompt", kind="benign" if cue is None else "intervened", tenant=prompt.tenant,
                request=prompt.request, prompt_ids=job.prompt_ids, prefix=reply.output_ids[:start],
                own=reply.output_ids[start:], whole=True, finish=reply.finish, policy_hash=runtime.policy.hash,
                detector=runtime.detector.version,
            )
        )  # fmt: skip
    return found, left


def _second(request: str, output: Sequence[int], runtime: GuardRuntime) -> int | None:
    """Where the second reasoning step begins."""
    walk = steps(Watched(request, output), runtime)
    return next((step.start for step, _ in islice(walk, 1, None)), None)
