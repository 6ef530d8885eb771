"""Reasoning quality kept: the share of auto-checked tasks that an arm solves, reasoning on, and its paired change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from align.evaluate import Arm, mean_of
from align.generate import Job
from align.tasks import Task, answers, solved
from align.text import ReplyReader
from classifiers.stats import Rate

if TYPE_CHECKING:
    from align.pipeline import Workbench

Figure = Literal["solved", "answered"]


@dataclass(frozen=True)
class Attempt:
    """One task as one arm answered it."""

    task: Task
    solved: bool
    answered: bool
    """The answer is right, which not every solved task needs (`align.tasks`)."""

    @property
    def cluster(self) -> str:
        """Tasks behind the same solved ones belong together, and so do several seeds' attempts at one task."""
        return "\n".join((self.task.kind, *(shot.prompt for shot in self.task.shots)))


def attempt(bench: Workbench, arms: Sequence[Arm], tasks: Sequence[Task]) -> dict[str, list[Attempt]]:
    """Every arm of one model on every task, in the tasks' order; resumable."""
    jobs = task_jobs(bench, arms, tasks)
    label = f"tasks: {', '.join(arm.name for arm in arms)}"
    file = bench.out / "evaluation" / f"tasks-{arms[0].model}.jsonl"
    results = bench.generator(arms[0].model).generate(jobs, file, label)
    return {
        arm.name: [_attempt(task, results[f"{arm.name}|{task.id}"].output_ids, bench.reader) for task in tasks]
        for arm in arms
    }  # fmt: skip


def task_jobs(bench: Workbench, arms: Sequence[Arm], tasks: Sequence[Task]) -> list[Job]:
    """What arms of one model are asked."""
    prompts = {task.id: bench.chat(messages(task, *marks(bench))) for task in tasks}
    return [
        Job(
            id=f"{arm.name}|{task.id}", prompt_ids=prompts[task.id], max_tokens=bench.settings.max_tokens,
            guard=arm.guard,
        )
        for arm in arms
        for task in tasks
    ]  # fmt: skip


def messages(task: Task, start: str, end: str) -> list[dict[str, str]]:
    """The solved tasks as turns of a conversation, then the task; `start`, `end` delimit the reasoning."""
    turns = []
    for shot in task.shots:
        turns.append({"role": "user", "content": shot.prompt})
        turns.append({"role": "assistant", "content": f"{start}\n{shot.thought}\n{end}\n{shot.answer}"})
    return [*turns, {"role": "user", "content": task.prompt}]


def marks(bench: Workbench) -> tuple[str, str]:
    """What opens and closes reasoning, as text; empty where nothing does."""
    paths = bench.runtime.grammar.paths
    opening, closing = paths.get(("answer", "reasoning"), ()), paths.get(("reasoning", "answer"), ())
    spelled = bench.tokenizer.convert_ids_to_tokens
    return "".join(map(str, spelled(list(opening)))), "".join(map(str, spelled(list(closing))))


def _attempt(task: Task, output: list[int], reader: ReplyReader) -> Attempt:
    reply = reader.read(output)
    return Attempt(task, solved(task, reply.reasoning, reply.answer), answers(task, reply.answer))


def share(attempts: Sequence[Attempt], figure: Figure = "solved") -> Rate:
    """Share of tasks solved (answered right), with an interval over clusters."""
    return Rate.clustered([getattr(a, figure) for a in attempts], [a.cluster for a in attempts])


def share_by_kind(attempts: Sequence[Attempt]) -> dict[str, Rate]:
    """Share solved of each kind of task."""
    return {kind: share([a for a in attempts if a.task.kind == kind]) for kind in dict.fromkeys(_kinds(attempts))}


def quality_change(before: Sequence[Attempt], after: Sequence[Attempt], figure: Figure = "solved") -> Rate:
    """after - before of the share solved (answered right), over the same tasks in the same order: a paired bootstrap
    that resamples clusters."""
    pairs = zip(before, after, strict=True)
    moved = [float(getattr(a, figure)) - float(getattr(b, figure)) for b, a in pairs]
    return mean_of(moved, [each.cluster for each in after])


def _kinds(attempts: Sequence[Attempt]) -> list[str]:
    return [a.task.kind for a in attempts]
