"""What a detector makes of each zone of an output.

Public and authored traces are reasoning only. What there is of answers comes from elsewhere: traces that an operator
labelled, outputs that the guard recorded, which nobody has labelled, and completions that people judged as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from classifiers.detector import Detector
from classifiers.judge_data import LabelledResponse
from classifiers.measure import Scored, figures
from classifiers.offline import ScoreRow, score_rows
from classifiers.review import Reviewed
from classifiers.stats import Rate
from guard.steps import Zone

ZONES: tuple[Zone, ...] = get_args(Zone)
Tick = Callable[[str], None]
ZoneRates = dict[Zone, dict[str, Rate]]


def zone_figures(scored: Sequence[Scored], threshold: float) -> ZoneRates:
    """All figures of labelled traces, each zone by itself; none of a zone that no step stands in."""
    return {zone: figures(within(scored, zone), threshold) for zone in ZONES}


def within(scored: Iterable[Scored], zone: Zone) -> list[Scored]:
    """The traces as if they held one zone's steps only; those without any are left out.

    The scores stay: a step was read with what came before it, whichever zone that was in. Tokens count from where the
    zone begins.
    """
    return [_only(each, kept) for each in scored if (kept := _steps_in(each, zone))]


def _steps_in(each: Scored, zone: Zone) -> list[int]:
    return [i for i in range(len(each.scores)) if (i in each.trace.answer) == (zone == "answer")]


def _only(each: Scored, kept: Sequence[int]) -> Scored:
    trace, new = each.trace, {old: number for number, old in enumerate(kept)}
    lengths = np.diff(each.ends, prepend=0)
    return Scored(
        replace(
            trace,
            steps=tuple(trace.steps[i] for i in kept),
            labels=tuple(trace.labels[i] for i in kept),
            unsure=frozenset(new[i] for i in trace.unsure if i in new),
            unlabelled=frozenset(new[i] for i in trace.unlabelled if i in new),
            answer=frozenset(new[i] for i in trace.answer if i in new),
        ),
        each.scores[list(kept)], np.cumsum(lengths[list(kept)]), each.part,
    )  # fmt: skip


def recorded_figures(detector: Detector, rows: Sequence[Reviewed], tick: Tick) -> ZoneRates:
    """Of recorded outputs the shares of requests and steps that the default policy would answer, and of steps that are
    unreadable. Nobody has said which of them are cues, so these are no error rates."""
    flagged: dict[Zone, list[tuple[bool, str]]] = defaultdict(list)
    hidden: dict[Zone, list[tuple[bool, str]]] = defaultdict(list)
    asked = (ScoreRow(id=row.id, request=row.request, steps=list(row.steps)) for row in rows)
    for number, (row, result) in enumerate(zip(rows, score_rows(detector, asked), strict=True), start=1):
        tick(f"recorded output {number} of {len(rows)}")
        for index, step in enumerate(result.steps):
            zone: Zone = "answer" if index in row.answer else "reasoning"
            flagged[zone].append((step.cue, row.id))
            hidden[zone].append((step.unreadable, row.id))
    return {
        zone: {
            "flagged_recorded_requests": _requests(flagged[zone]),
            "flagged_recorded_steps": Rate.clustered(*zip(*flagged[zone], strict=True)),
            "unreadable_recorded_steps": Rate.clustered(*zip(*hidden[zone], strict=True)),
        }
        for zone in ZONES
        if flagged[zone]
    }


def _requests(steps: Iterable[tuple[bool, str]]) -> Rate:
    """The share of requests with any flagged step."""
    found: dict[str, bool] = {}
    for flag, owner in steps:
        found[owner] = found.get(owner, False) or flag
    return Rate.of(sum(found.values()), len(found))


def answer_figures(detector: Detector, rows: Sequence[LabelledResponse], tick: Tick) -> dict[str, Rate]:
    """The shares of harmful and of harmless completions with a step that the default policy would answer.

    Judged as a whole, by people; no step of them is labelled. Each is scored as an answer without reasoning before it.
    Intervals know that several models answered one request.
    """
    hits: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    asked = (ScoreRow(id=str(number), request=row.request, reasoning=row.response) for number, row in enumerate(rows))
    for number, (row, result) in enumerate(zip(rows, score_rows(detector, asked), strict=True), start=1):
        tick(f"completion {number} of {len(rows)}")
        name = "flagged_harmful_answers" if row.harmful else "flagged_harmless_answers"
        hits[name].append((result.first_cue is not None, row.request))
    return {name: Rate.clustered(*zip(*found, strict=True)) for name, found in sorted(hits.items())}
