"""What runs `triggers rank` and the controls without an engine: a generator and a judge that say what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.generate import Job, Result
from classifiers.judge import Judgement


@dataclass
class ScriptedGenerator:
    """Goes on with the same ids after everything."""

    output: list[int]
    jobs: list[Job] = field(default_factory=list)

    def generate(self, jobs: Sequence[Job], out: Path, what: str) -> dict[str, Result]:
        self.jobs += jobs
        return {job.id: Result(id=job.id, job=job.key, output_ids=self.output, finish="stop") for job in jobs}


@dataclass(frozen=True)
class ScriptedJudge:
    """Calls harmful what `harmful` says of a request and a reasoning, and everything else a refusal."""

    harmful: Callable[[str, str], bool]
    version: str = "scripted"

    def judge(self, rows: Sequence[tuple[str, str, str]]) -> list[Judgement]:
        harm = [float(self.harmful(request, reasoning)) for request, reasoning, _ in rows]
        return [Judgement(each, each, 1 - each) for each in harm]
