"""Counterfactual rollouts: what the model says after a trigger, and what it says after the cue, from the same prefix.

An intervened source gives a pair whose chosen side begins with a trigger in the cue's place (paper, section 4). A
benign source gives one the other way round: its own reasoning is preferred over what a trigger would have made of it.
Every side is judged; the detector has no say in what is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from align.candidates import Candidate, RolloutSettings, candidates
from align.generate import Job, Result
from align.pairs import Pair, pair_id
from align.rounds import SPENT, TOO_LONG, Attempt, Budget, Round, fits, run_rounds
from align.seam import SeamCheck, Side
from align.sources import Kind, Prompt, Source, from_prompts, from_traces, sampling_jobs, unrepeated
from align.tools import Tools
from classifiers.judge import Judgement
from guard.traces import Trace
from guard.triggers import EncodedTrigger

Chooser = Callable[[Sequence[Source], Sequence[EncodedTrigger], RolloutSettings], tuple[list[Candidate], Counter[str]]]


class Sides(NamedTuple):
    """The two continuations of one prefix."""

    chosen: Side
    rejected: Side


class Harvest(BaseModel):
    """What rolling out brought: pairs before duplicates and quotas, and a count of everything else."""

    model_config = ConfigDict(extra="forbid")

    pairs: list[Pair] = []
    dropped: Counter[str] = Field(default_factory=Counter)
    """Traces, prompts and candidates that gave no pair, by reason."""
    sources: Counter[str] = Field(default_factory=Counter)
    """By origin and kind."""
    candidates: int = 0
    generations: Counter[str] = Field(default_factory=Counter)
    """Continuations by the hash of their request."""
    rounds: list[Round] = []

    def __add__(self, other: Harvest) -> Harvest:
        """What two machines brought, or two batches."""
        return Harvest(
            pairs=self.pairs + other.pairs, dropped=self.dropped + other.dropped, sources=self.sources + other.sources,
            candidates=self.candidates + other.candidates, generations=self.generations + other.generations,
            rounds=[a + b for a, b in zip_longest(self.rounds, other.rounds, fillvalue=Round())],
        )  # fmt: skip


def roll_out(
    traces: Sequence[Trace],
    prompts: Sequence[Prompt],
    tools: Tools,
    settings: RolloutSettings,
    out: Path,
    choose: Chooser = candidates,
) -> Harvest:
    """Traces and prompts -> judged pairs. Resumes from what `out` holds of generated continuations."""
    harvest, budget = Harvest(), Budget(settings.max_generations)
    sources, harvest.dropped = from_traces(traces)
    if prompts:
        more, left = _sampled(prompts, tools, settings, budget, out)
        sources += more
        harvest.dropped += left
    harvest.sources = Counter(f"{source.origin}: {source.kind}" for source in sources)
    todo, left = choose(sources, tools.runtime.triggers, settings)
    harvest.dropped += left
    harvest.candidates = len(todo)
    admitted, others, left = _admit(todo, tools, settings, budget)
    harvest.dropped += left
    attempts, beside, harvest.rounds = run_rounds(admitted, others, tools, settings, budget, out)
    harvest.pairs, left = _confirm(attempts, beside, tools, settings)
    harvest.dropped += left
    harvest.generations = Counter({pair_id(request): n for request, n in budget.spent.items()})
    return harvest


def _sampled(
    prompts: Sequence[Prompt], tools: Tools, settings: RolloutSettings, budget: Budget, out: Path
) -> tuple[list[Source], Counter[str]]:
    """Sources of the prompts: one unguarded reply each."""
    once, left = unrepeated(prompts)
    taken: list[Prompt] = []
    jobs: list[Job] = []
    for prompt, job in zip(once, sampling_jobs(once, tools.render, settings.sample_tokens), strict=True):
        if not fits(job, tools.backend):
            left[f"prompt: {TOO_LONG}"] += 1
        elif not budget.take(prompt.request):
            left[f"prompt: {SPENT}"] += 1
        else:
            taken.append(prompt)
            jobs.append(job)
    replies = tools.backend.generate(jobs, out / "samples.jsonl", "replies to prompts")
    found, reasons = from_prompts(taken, jobs, replies, tools.runtime)
    return found, left + reasons


def _admit(
    todo: Sequence[Candidate], tools: Tools, settings: RolloutSettings, budget: Budget
) -> tuple[list[Attempt], list[Job], Counter[str]]:
    """The attempts that context and budget have room for, and what continues their cues: once per source."""
    attempts: list[Attempt] = []
    cues: dict[str, Job] = {}
    left: Counter[str] = Counter()
    for candidate in todo:
        attempt = Attempt.begin(candidate, tools.runtime)
        cue = None if candidate.source.whole else _cue_job(candidate, settings)
        request = candidate.source.request
        if not fits(attempt.job(settings), tools.backend) or (cue is not None and not fits(cue, tools.backend)):
            left[f"{candidate.kind}: {TOO_LONG}"] += 1
            continue
        beside = cue is not None and cue.id not in cues
        if not budget.take(request, 1 + beside):
            left[f"{candidate.kind}: {SPENT}"] += 1
            continue
        attempts.append(attempt)
        if cue is not None:
            cues[cue.id] = cue
    return attempts, list(cues.values()), left


def _cue_id(candidate: Candidate) -> str:
    return f"{candidate.source.id}-cue"


def _cue_job(candidate: Candidate, settings: RolloutSettings) -> Job:
    """The cue continued without a guard: the side of an intervened source that its trace does not hold."""
    prompt = [*candidate.source.prompt_ids, *candidate.prefix, *candidate.source.own]
    return Job(id=_cue_id(candidate), prompt_ids=prompt, max_tokens=settings.max_tokens)


def _confirm(
    attempts: Sequence[Attempt], beside: dict[str, Result], tools: Tools, settings: RolloutSettings
) -> tuple[list[Pair], Counter[str]]:
    """The pairs that fit together as ids and that the judge agrees to, and why the others are dropped."""
    dropped: Counter[str] = Counter()
    whole: list[tuple[Attempt, Sides]] = []
    for attempt in attempts:
        sides = _sides(attempt, beside)
        reason = _misfit(attempt.candidate, sides, tools.seam)
        if reason is None:
            whole.append((attempt, sides))
        else:
            dropped[f"{attempt.candidate.kind}: {reason}"] += 1
    replies = [
        (a.candidate.source.request, reply.reasoning, reply.answer)
        for a, sides in whole
        for reply in (tools.reader.read([*a.candidate.prefix, *side.ids]) for side in sides)
    ]
    verdicts = tools.judge.judge(replies)
    pairs = []
    for (attempt, sides), chosen, rejected in zip(whole, verdicts[::2], verdicts[1::2], strict=True):
        reason = _objection(attempt.candidate.kind, chosen, rejected)
        if reason is None:
            pairs.append(_pair(attempt, sides, (chosen, rejected), tools, settings))
        else:
            dropped[f"{attempt.candidate.kind}: {reason}"] += 1
    return pairs, dropped


def _sides(attempt: Attempt, beside: dict[str, Result]) -> Sides:
    """What follows the prefix on either side."""
    candidate = attempt.candidate
    source = candidate.source
    if source.whole:
        own = Side((candidate.source.own,), source.finish)
    else:
        after = beside[_cue_id(candidate)]
        own = Side((candidate.source.own, after.output_ids), after.finish)
    return Sides(own, attempt.side) if candidate.kind == "benign" else Sides(attempt.side, own)


def _misfit(candidate: Candidate, sides: Sides, seam: SeamCheck) -> str | None:
    """Why the sides are no two continuations of the prefix, or None."""
    chosen, rejected = sides.chosen.ids, sides.rejected.ids
    if not chosen or not rejected or chosen[0] == rejected[0]:
        return "sides do not part at the divergence"
    found = (seam.objection(candidate.source.prompt_ids, candidate.prefix, side) for side in sides)
    return next((reason for reason in found if reason is not None), None)


def _objection(kind: Kind, chosen: Judgement, rejected: Judgement) -> str | None:
    """Why the judge does not confirm the preference, or None."""
    if chosen.reasoning_harm >= 0.5:
        return "chosen reasoning judged harmful"
    if chosen.answer_harm >= 0.5:
        return "chosen answer judged harmful"
    if kind == "intervened":
        return "rejected reasoning judged harmless" if rejected.reasoning_harm < 0.5 else None
    # The rejected side need not end in a refusal: a trigger that a benign request does not call for is unwanted even
    # where the model recovers from it (132 of 144 in the demo).
    return "chosen answer refuses" if chosen.refusal >= 0.5 else None


def _pair(
    attempt: Attempt, sides: Sides, verdicts: tuple[Judgement, Judgement], tools: Tools, settings: RolloutSettings
) -> Pair:
    candidate, source = attempt.candidate, attempt.candidate.source
    chosen, rejected = verdicts
    return Pair(
        id=pair_id(candidate.id, candidate.kind), kind=candidate.kind, guard_id=source.id, tenant=source.tenant,
        request=source.request, prompt_ids=source.prompt_ids, prefix_ids=candidate.prefix,
        chosen_ids=sides.chosen.ids, rejected_ids=sides.rejected.ids, trigger_id=candidate.trigger.id,
        chosen_harm=chosen.reasoning_harm, rejected_harm=rejected.reasoning_harm, interventions=attempt.placed,
        chosen_finish=sides.chosen.finish, rejected_finish=sides.rejected.finish,
        provenance=tools.provenance(source, settings.hash),
    )  # fmt: skip
