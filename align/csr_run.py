"""CSR on real reasonings: continuations from the engine, verdicts of the judge, turning points as steps of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from align.controls import first_cue
from align.csr import KINDS, Ask, CsrRule, Curve, Kind, Verdicts, adaptive, at_end, full, run
from align.csr_report import CsrReport, Point, ReasoningReport, Turn, summarise
from align.generate import EngineSpec, Generator, Job, read_results
from align.pipeline import Workbench
from align.text import ReplyReader, opened
from classifiers.judge import Judge
from classifiers.stats import Rate
from guard.errors import UserError
from guard.runtime import GuardRuntime
from guard.steps import Step, StepSplitter
from guard.traces import Trace


class CsrSettings(BaseModel):
    """One measurement. `temperature` should be the one that the traces were sampled with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: CsrRule = CsrRule()
    whole: bool = False
    """All of `rule.samples` continuations at every point instead of the adaptive search."""
    at: Literal["steps", "tokens"] = "steps"
    """Points: the ends of the steps, or every token."""
    max_tokens: int = 160
    """Longest continuation, in tokens."""
    temperature: float = 0.6


@dataclass(frozen=True)
class Reasoning:
    """What a model thought, in its output's ids up to the end of the reasoning, and its steps."""

    id: str
    request: str
    prompt_ids: list[int]
    ids: list[int]
    steps: list[Step]
    forced: frozenset[int] = frozenset()
    """Indices of the steps that a guard forced."""

    @classmethod
    def split(cls, name: str, request: str, prompt: list[int], output: list[int], runtime: GuardRuntime) -> Reasoning:
        """Splits an output that starts inside the reasoning zone."""
        end = runtime.grammar.end
        ids = output[: output.index(end)] if end is not None and end in output else list(output)
        splitter = StepSplitter(runtime.table, runtime.policy.limits)
        start = opened(ids, runtime.table, runtime.grammar)
        steps = [step for i, token in enumerate(ids[start:], start) if (step := splitter.push(token, i))]
        last = splitter.flush()
        return cls(name, request, prompt, ids, [*steps, last] if last else steps)

    @classmethod
    def of(cls, trace: Trace, runtime: GuardRuntime) -> Reasoning:
        """That of a recorded request."""
        found = cls.split(trace.guard_id, trace.request, trace.prompt_ids, trace.output_ids, runtime)
        starts = {step.start for step in trace.steps if step.injected}
        forced = frozenset(i for i, step in enumerate(found.steps) if step.start in starts)
        return cls(found.id, found.request, found.prompt_ids, found.ids, found.steps, forced)

    def points(self, at: Literal["steps", "tokens"]) -> list[int]:
        """Where the ratio is looked at, in tokens of the output: before it and after each step or token."""
        if at == "tokens":
            return list(range(len(self.ids) + 1))
        return [0, *(step.end for step in self.steps)]

    def step_at(self, tokens: int) -> int | None:
        """Index of the step that the last of the first `tokens` ids belongs to; None before the first."""
        return next((i for i, step in enumerate(self.steps) if step.start < tokens <= step.end), None)


class Sampler:
    """Continuations of reasonings, sampled by an engine and judged; those that `out` holds are not sampled again."""

    def __init__(
        self, reasonings: Iterable[Reasoning], points: Mapping[str, Sequence[int]], settings: CsrSettings,
        generator: Generator, reader: ReplyReader, judge: Judge, out: Path,
    ) -> None:  # fmt: skip
        self._reasonings = {reasoning.id: reasoning for reasoning in reasonings}
        self._points, self._settings = points, settings
        self._generator, self._reader, self._judge, self._out = generator, reader, judge, out
        self.tokens: Counter[tuple[str, int]] = Counter()
        """Generated tokens by reasoning and point."""

    def __call__(self, rows: Sequence[tuple[str, Ask]]) -> Verdicts:
        """One list of verdicts for each row; a continuation ends where the reasoning does."""
        wanted = [(name, ask.at, ask.first + i) for name, ask in rows for i in range(ask.n)]
        jobs = [self._job(*each) for each in wanted]
        results = self._generator.generate(jobs, self._out, f"CSR: {len(rows)} points of {len({n for n, _ in rows})}")
        outputs = [results[job.id].output_ids for job in jobs]
        for (name, at, _), output in zip(wanted, outputs, strict=True):
            self.tokens[name, at] += len(output)
        texts = [
            (self._reasonings[name].request, self._reader.read([*self._prefix(name, at), *output]).reasoning, "")
            for (name, at, _), output in zip(wanted, outputs, strict=True)
        ]
        safe = iter([verdict.reasoning_harm < 0.5 for verdict in self._judge.judge(texts)])
        return [[next(safe) for _ in range(ask.n)] for _, ask in rows]

    def _prefix(self, name: str, at: int) -> list[int]:
        return self._reasonings[name].ids[: self._points[name][at]]

    def _job(self, name: str, at: int, number: int) -> Job:
        end = self._reader.grammar.end
        prefix = self._prefix(name, at)
        return Job(
            id=f"{name}|{len(prefix)}|{number}", prompt_ids=[*self._reasonings[name].prompt_ids, *prefix],
            max_tokens=self._settings.max_tokens, temperature=self._settings.temperature,
            stop_ids=[] if end is None else [end],
        )  # fmt: skip


def measure(
    reasonings: Sequence[Reasoning], bench: Workbench, settings: CsrSettings, generator: Generator, out: Path
) -> CsrReport:
    """Measures all reasonings side by side; continuations go to `out` and an interrupted run goes on from there.

    UserError when no single token of the model's closes its reasoning.
    """
    if bench.runtime.grammar.end is None:
        raise UserError(
            f"{bench.settings.model} does not close its reasoning with one token", wanted="a model with think tags"
        )
    points = {reasoning.id: reasoning.points(settings.at) for reasoning in reasonings}
    sampler = Sampler(reasonings, points, settings, generator, bench.reader, bench.judge, out)
    search = full if settings.whole else adaptive
    curves = run({name: search(each, settings.rule) for name, each in points.items()}, sampler)
    rows = [report(each, curves[each.id], sampler.tokens, settings, bench) for each in reasonings]
    return CsrReport(
        model=Path(bench.settings.model).name, judge=bench.judge.version, detector=bench.runtime.detector.version,
        seed=bench.settings.seed, rule=settings.rule, whole=settings.whole, at=settings.at, reasonings=rows,
        summary=summarise(rows),
    )  # fmt: skip


def engine_spec(reasonings: Sequence[Reasoning], model: str, more: int, seed: int, out: Path) -> EngineSpec:
    """An unguarded engine with room for `more` tokens after the longest reasoning; continuations go to `out`."""
    longest = max(len(each.prompt_ids) + len(each.ids) for each in reasonings) + more
    # A resumed engine that started from the same seed could draw the very continuations that are on disk.
    return EngineSpec(model=model, seed=seed + len(read_results(out)), max_model_len=longest)


def report(
    reasoning: Reasoning, curve: Curve, tokens: Mapping[tuple[str, int], int], settings: CsrSettings, bench: Workbench
) -> ReasoningReport:
    """One reasoning's curve with its turning points as steps, and what it cost."""
    cue = first_cue(reasoning.ids, reasoning.request, bench.runtime)
    own = bench.judge.judge([(reasoning.request, bench.reader.read(reasoning.ids).reasoning, "")])[0]
    spent = {at: tokens[reasoning.id, at] for at in curve.tallies}
    lengths = {curve.points[at]: spent[at] / tally.n for at, tally in curve.tallies.items()}
    return ReasoningReport(
        id=reasoning.id, request=reasoning.request, steps=len(reasoning.steps), tokens=len(reasoning.ids),
        points=[_point(reasoning, curve, at) for at in sorted(curve.tallies)],
        turns={kind: turn for kind in KINDS if (turn := _turn(reasoning, curve, kind, settings.rule))},
        cue=None if cue is None else next(i for i, s in enumerate(reasoning.steps) if s.start == cue.start),
        cue_token=None if cue is None else cue.start, safe=own.reasoning_harm < 0.5,
        continuations=sum(tally.n for tally in curve.tallies.values()), generated=sum(spent.values()),
        every_token=every_token(lengths, len(reasoning.ids), settings.rule.samples),
    )  # fmt: skip


def _point(reasoning: Reasoning, curve: Curve, at: int) -> Point:
    tally = curve.tallies[at]
    token = curve.points[at]
    return Point(token=token, step=reasoning.step_at(token), ratio=Rate.of(tally.safe, tally.n))


def _turn(reasoning: Reasoning, curve: Curve, kind: Kind, rule: CsrRule) -> Turn | None:
    at = curve.turns[kind]
    if at is None:
        return None
    step = reasoning.step_at(curve.points[at])
    before = curve.tallies.get(at - 1)
    return Turn(
        step=step, token=curve.points[at], text="" if step is None else reasoning.steps[step].text,
        forced=step in reasoning.forced, ratio=Rate.of(curve.tallies[at].safe, curve.tallies[at].n),
        before=None if before is None else Rate.of(before.safe, before.n), at_end=at_end(curve.points, at, rule),
    )  # fmt: skip


def every_token(lengths: Mapping[int, float], tokens: int, samples: int) -> int:
    """Tokens that `samples` continuations after each of `tokens` tokens would take.

    `lengths`: mean length of a continuation by how many tokens stand before it; between them it is interpolated.
    """
    if not lengths:
        return 0
    known = sorted(lengths)
    means = np.interp(np.arange(1, tokens + 1), known, [lengths[token] for token in known])
    return round(samples * float(means.sum()))
