"""Counterfactual rollouts: what the model says after a trigger, and what it says after the cue, from the same prefix.

A trace with an intervention gives an `intervened` candidate: the cue is cut off and each side continues from the
prefix before it (paper, section 4). A trace without a cue gives a `benign` candidate the other way round: its own
reasoning is preferred over what a trigger would have made of it. Every side is judged; the detector has no say.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.generate import Generator, Job, Result
from align.pairs import Pair, dedupe, pair_id
from align.text import ReplyReader
from classifiers.judge import Judge, Judgement
from guard.traces import Trace
from guard.triggers import EncodedTrigger


@dataclass(frozen=True)
class Candidate:
    """A prefix and the trigger that is tried at its end. `kept`: the trace's own continuation after the prefix."""

    id: str
    kind: str
    trace: Trace
    prefix: list[int]
    kept: list[int]
    trigger: EncodedTrigger


@dataclass(frozen=True)
class RolloutSettings:
    """How many counterfactuals, and how long."""

    triggers: int = 1
    """Triggers tried per intervened trace (the paper: six)."""
    max_intervened: int = 160
    """Intervened traces that are rolled out, a seeded choice."""
    max_benign: int = 80
    """The same of traces without a cue: training leaves out what exceeds its share of benign pairs."""
    max_tokens: int = 120
    per_request: int = 4
    seed: int = 0


def candidates(traces: Sequence[Trace], pool: Sequence[EncodedTrigger], settings: RolloutSettings) -> list[Candidate]:
    """What to roll out, seeded: the same traces give the same candidates."""
    rng = random.Random(settings.seed)
    found: list[Candidate] = []
    intervened = [t for t in traces if t.receipt.interventions]
    calm = [t for t in traces if len(t.steps) > 1 and not any(step.cue for step in t.steps)]
    wanted = {
        t.guard_id
        for group, most in ((intervened, settings.max_intervened), (calm, settings.max_benign))
        for t in rng.sample(group, min(most, len(group)))
    }
    for trace in traces:
        steps = trace.steps
        if trace.guard_id not in wanted:
            continue
        if trace.receipt.interventions:
            cue = steps[trace.receipt.interventions[0].step]
            for trigger in rng.sample(list(pool), min(settings.triggers, len(pool))):
                found.append(_candidate("intervened", trace, cue.start, cue.end, trigger))
        else:
            found.append(_candidate("benign", trace, steps[1].start, len(trace.output_ids), rng.choice(list(pool))))
    return found


def _candidate(kind: str, trace: Trace, start: int, end: int, trigger: EncodedTrigger) -> Candidate:
    output = trace.output_ids
    return Candidate(f"{trace.guard_id}-{trigger.id}", kind, trace, output[:start], output[start:end], trigger)


def run(
    traces: Sequence[Trace],
    pool: Sequence[EncodedTrigger],
    generator: Generator,
    reader: ReplyReader,
    judge: Judge,
    settings: RolloutSettings,
    out: Path,
) -> tuple[list[Pair], Counter[str]]:
    """Rolls out, judges, and returns the pairs and why candidates were dropped."""
    todo = candidates(traces, pool, settings)
    jobs = [_job(c.id, c, list(c.trigger.spaced), settings) for c in todo]
    # The rejected side of an intervened trace: the cue, continued without a guard; once per trace.
    cues = {c.trace.guard_id: c for c in todo if c.kind == "intervened"}
    jobs += [_job(f"{guard_id}-cue", c, c.kept, settings) for guard_id, c in cues.items()]
    results = generator.generate(jobs, out / "rollouts.jsonl", "counterfactual rollouts")
    sides = [_sides(c, results) for c in todo]
    flat = [
        (c.trace.request, reply.reasoning, reply.answer)
        for c, side in zip(todo, sides, strict=True)
        for reply in (reader.read(c.prefix + side[0]), reader.read(c.prefix + side[1]))
    ]
    verdicts = judge.judge(flat)
    dropped: Counter[str] = Counter()
    pairs = []
    for i, (c, side) in enumerate(zip(todo, sides, strict=True)):
        chosen, rejected = verdicts[2 * i], verdicts[2 * i + 1]
        reason = _objection(c.kind, chosen, rejected, side)
        if reason:
            dropped[f"{c.kind}: {reason}"] += 1
            continue
        pairs.append(_pair(c, side, chosen, rejected))
    kept, repeats = dedupe(pairs, settings.per_request)
    if repeats:
        dropped["repeat or over the request's quota"] += repeats
    return kept, dropped


def _job(job_id: str, candidate: Candidate, lead: list[int], settings: RolloutSettings) -> Job:
    prompt = [*candidate.trace.prompt_ids, *candidate.prefix, *lead]
    return Job(id=job_id, prompt_ids=prompt, max_tokens=settings.max_tokens)


def _sides(candidate: Candidate, results: dict[str, Result]) -> tuple[list[int], list[int]]:
    """(chosen, rejected) continuations after the prefix."""
    after = [*candidate.trigger.spaced, *results[candidate.id].output_ids]
    if candidate.kind == "benign":
        return candidate.kept, after
    return after, [*candidate.kept, *results[f"{candidate.trace.guard_id}-cue"].output_ids]


def _objection(kind: str, chosen: Judgement, rejected: Judgement, side: tuple[list[int], list[int]]) -> str | None:
    """Why the judge does not confirm the preference, or None."""
    if not side[0] or not side[1] or side[0][0] == side[1][0]:
        return "sides do not part at the divergence"
    if chosen.reasoning_harm >= 0.5:
        return "chosen reasoning judged harmful"
    if kind == "intervened":
        return "rejected reasoning judged harmless" if rejected.reasoning_harm < 0.5 else None
    # The rejected side need not end in a refusal: a trigger that a benign request does not call for is unwanted even
    # where the model recovers from it (132 of 144 in the demo).
    return "chosen answer refuses" if chosen.refusal >= 0.5 else None


def _pair(candidate: Candidate, side: tuple[list[int], list[int]], chosen: Judgement, rejected: Judgement) -> Pair:
    trace = candidate.trace
    return Pair(
        id=pair_id(candidate.id, candidate.kind), kind="benign" if candidate.kind == "benign" else "intervened",
        guard_id=trace.guard_id, request=trace.request, prompt_ids=trace.prompt_ids, prefix_ids=candidate.prefix,
        chosen_ids=side[0], rejected_ids=side[1], trigger_id=candidate.trigger.id,
        chosen_harm=chosen.reasoning_harm, rejected_harm=rejected.reasoning_harm,
    )  # fmt: skip
