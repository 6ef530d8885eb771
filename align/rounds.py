"""Iterative intervention: every round continues all open attempts in one batch, then cuts off cues that came back.

A cue that comes back is cut before its step, and the next trigger stands in its place (paper, section 4 and Fig. 6).
The detector only says where to cut: whether a side is kept is the judge's decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align.backend import Backend
from align.candidates import Candidate, RolloutSettings, place
from align.cues import Watched, first_cues
from align.generate import Job, Result
from align.pairs import Placed, request_key
from align.seam import Side
from align.tools import Tools
from guard.runtime import GuardRuntime
from guard.triggers import EncodedTrigger, choose

TOO_LONG, SPENT = "longer than the engine's context", "request's generations used up"


class Budget:
    """Generations per request; retries of a failed one do not count."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.spent: Counter[str] = Counter()

    def take(self, request: str, count: int = 1) -> bool:
        """Books `count` generations if the request may have that many more, or none of them."""
        key = request_key(request)
        if self.spent[key] + count > self._limit:
            return False
        self.spent[key] += count
        return True


class Round(BaseModel):
    """One round: continuations generated; how many of them were `watched` for another cue (none in the last round,
    after which nothing is cut), and in how many it `returned`."""

    model_config = ConfigDict(extra="forbid")

    generated: int = 0
    watched: int = 0
    returned: int = 0

    def __add__(self, other: Round) -> Round:
        """The same round of two batches."""
        return Round(
            generated=self.generated + other.generated,
            watched=self.watched + other.watched,
            returned=self.returned + other.returned,
        )


@dataclass
class Attempt:
    """A candidate's triggered side while it is made: `lead` in pieces (trigger, what was kept, trigger, ...), then the
    newest continuation."""

    candidate: Candidate
    pieces: list[list[int]]
    placed: list[Placed]
    continuation: list[int] = field(default_factory=list)
    finish: str | None = None

    @classmethod
    def begin(cls, candidate: Candidate, runtime: GuardRuntime) -> Attempt:
        """The first trigger at the end of the prefix."""
        trigger = list(candidate.trigger.ids(place(candidate.prefix, runtime.table)))
        return cls(candidate, [trigger], [Placed(trigger_id=candidate.trigger.id, at=len(candidate.prefix))])

    @property
    def output(self) -> list[int]:
        """The whole output so far: prefix, lead, continuation."""
        return [*self.candidate.prefix, *self.side.ids]

    @property
    def side(self) -> Side:
        """What follows the prefix."""
        return Side((*self.pieces, self.continuation), self.finish)

    @property
    def start(self) -> int:
        """Output index at which the continuation begins."""
        return len(self.candidate.prefix) + sum(map(len, self.pieces))

    def job(self, settings: RolloutSettings) -> Job:
        """The next continuation. The first round's id is the candidate's."""
        candidate, number = self.candidate, len(self.placed)
        prompt = [*candidate.source.prompt_ids, *candidate.prefix, *(i for piece in self.pieces for i in piece)]
        job_id = candidate.id if number == 1 else f"{candidate.id}-r{number}"
        return Job(id=job_id, prompt_ids=prompt, max_tokens=settings.max_tokens)

    def answered(self, cue: int, trigger: EncodedTrigger, runtime: GuardRuntime) -> Attempt:
        """This attempt cut at output index `cue`, with a trigger there and nothing after it yet."""
        kept = self.continuation[: cue - self.start]
        before = [*self.pieces[-1], *kept]
        pieces = [*self.pieces, *([kept] if kept else []), list(trigger.ids(place(before, runtime.table)))]
        return Attempt(self.candidate, pieces, [*self.placed, Placed(trigger_id=trigger.id, at=cue)])


def fits(job: Job, backend: Backend) -> bool:
    """Whether the engine has room for the prompt and everything that is asked of it."""
    return len(job.prompt_ids) + job.max_tokens <= backend.context


def run_rounds(
    attempts: Sequence[Attempt],
    others: Sequence[Job],
    tools: Tools,
    settings: RolloutSettings,
    budget: Budget,
    out: Path,
) -> tuple[list[Attempt], dict[str, Result], list[Round]]:
    """The finished attempts in their order, the results of `others` (generated with the first round), and the rounds.

    The first round's generations are booked by the caller, later ones here: an attempt whose budget, context or pool of
    triggers is used up stays as it is.
    """
    finished = list(attempts)
    going = list(range(len(finished)))
    rounds: list[Round] = []
    file = out / "rollouts.jsonl"
    jobs = {i: finished[i].job(settings) for i in going}
    results = tools.backend.generate([*jobs.values(), *others], file, "counterfactual rollouts")
    beside = {job.id: results[job.id] for job in others}
    while True:
        for i, job in jobs.items():
            finished[i].continuation, finished[i].finish = results[job.id].output_ids, results[job.id].finish
        if len(rounds) + 1 == settings.rounds:
            return finished, beside, [*rounds, Round(generated=len(jobs))]
        going = [i for i in going if finished[i].candidate.kind == "intervened"]
        cues = dict(zip(going, _cues([finished[i] for i in going], tools.runtime), strict=True))
        returned = {i: cue for i, cue in cues.items() if cue is not None}
        rounds.append(Round(generated=len(jobs), watched=len(cues), returned=len(returned)))
        answered = {i: _answer(finished[i], cue, tools, settings, budget) for i, cue in returned.items()}
        following = {i: attempt for i, attempt in answered.items() if attempt is not None}
        if not following:
            return finished, beside, rounds
        for i, attempt in following.items():
            finished[i] = attempt
        going = list(following)
        jobs = {i: finished[i].job(settings) for i in going}
        results = tools.backend.generate(list(jobs.values()), file, f"rollouts, round {len(rounds) + 1}")


def _cues(attempts: Sequence[Attempt], runtime: GuardRuntime) -> list[int | None]:
    """Of each continuation the output index at which its first cue begins."""
    rows = [Watched(a.candidate.source.request, a.output, a.start) for a in attempts]
    return [None if step is None else step.start for step in first_cues(rows, runtime)]


def _answer(attempt: Attempt, cue: int, tools: Tools, settings: RolloutSettings, budget: Budget) -> Attempt | None:
    """The attempt with its cue answered, or None where no trigger, no room or no generation is left."""
    used = [placed.trigger_id for placed in attempt.placed]
    key = f"{settings.seed}|{attempt.candidate.id}|{len(used)}".encode("utf-8", "surrogatepass")
    trigger = choose(tools.runtime.triggers, used, key)
    if trigger is None:
        return None
    following = attempt.answered(cue, trigger, tools.runtime)
    if not fits(following.job(settings), tools.backend) or not budget.take(attempt.candidate.source.request):
        return None
    return following
