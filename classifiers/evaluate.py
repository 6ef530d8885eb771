"""Measures a detector on the frozen test part: per request, per step, per zone, by slice, by tier, under attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from classifiers.artifact import load_files
from classifiers.build import score_encoded
from classifiers.corpus import Corpus
from classifiers.detector import REPLAY_FILE, Detector
from classifiers.judge_data import LabelledResponse
from classifiers.labels import LabelledTrace
from classifiers.measure import Scored, calibration, figures, request_figures, slices, step_figures
from classifiers.perturb import ATTACKS, attacked, rewritten
from classifiers.review import Reviewed
from classifiers.stats import Rate, bootstrap
from classifiers.vectors import EncodedTrace, encode_traces, unpack
from classifiers.zones import ZoneRates, answer_figures, recorded_figures, zone_figures

Tick = Callable[[str], None]
SUMMARY = (
    "recall_complying_traces", "flagged_benign_traces", "flagged_alarming_traces", "flagged_deliberating_traces",
    "unreadable_benign_traces", "unreadable_alarming_traces", "detected_within_128_tokens",
    "median_tokens_to_detection", "auroc_cue_vs_benign", "auroc_cue_vs_deliberation",
)  # fmt: skip
"""The figures of a slice."""
NO_ANSWERS = (
    "No labelled step of the test part stands in an answer: the labelled traces that ship are reasoning only. Label "
    "outputs whose policy watched `zones: [reasoning, answer]` (--data), or give them unlabelled (--traces), or give "
    "completions that people judged (--responses)."
)


class Evaluation(BaseModel):
    """What `classifier eval` writes as eval.json."""

    model_config = ConfigDict(extra="forbid")

    detector: str
    threshold: float
    traces: int
    per_request: dict[str, Rate]
    per_step: dict[str, Rate]
    per_zone: ZoneRates
    """Of labelled steps, of recorded outputs and of judged completions, as far as they were given."""
    notes: list[str]
    """What could not be measured, and what it would take."""
    slices: dict[str, dict[str, Rate]]
    tiers: dict[str, Rate]
    """What the first tier clears and what that costs, on traces with their text."""
    attacks: dict[str, dict[str, Rate]]
    """Recall of complying traces before and after each attack, and the difference, paired."""
    command: str


def frozen_part(path: Path, detector: Detector, corpus: Corpus) -> list[EncodedTrace]:
    """The frozen test part for one detector: traces with text, and the public ones from its own vectors.

    Sorted by id, so that two detectors score the same traces in the same order.
    """
    fresh = encode_traces(detector.encoder, corpus.part("test"))
    _, files = load_files(path, "detector")
    known = unpack(files[REPLAY_FILE])[0] if REPLAY_FILE in files else []
    ids = {each.trace.id for each in fresh}
    public = [each for each in known if each.part == "test" and each.trace.id not in ids]
    return sorted([*fresh, *public], key=lambda each: each.trace.id)


def evaluate(
    detector: Detector,
    traces: Sequence[EncodedTrace],
    command: str,
    tick: Tick = lambda _: None,
    recorded: Sequence[Reviewed] = (),
    responses: Sequence[LabelledResponse] = (),
) -> Evaluation:
    """Score all traces, what an operator recorded and what people judged, and return every figure."""
    tick("scoring")
    scored = score_encoded(detector, traces)
    per_step = step_figures(scored, detector.threshold)
    if scored:
        per_step["calibration_error"] = calibration(scored)
    per_zone = zone_figures(scored, detector.threshold)
    notes = [NO_ANSWERS] if not per_zone["answer"] else []
    for zone, found in recorded_figures(detector, recorded, tick).items():
        per_zone[zone] |= found
    per_zone["answer"] |= answer_figures(detector, responses, tick)
    tick("the first tier")
    return Evaluation(
        detector=detector.version,
        threshold=detector.threshold,
        traces=len(traces),
        per_request=request_figures(scored, detector.threshold),
        per_step=per_step,
        per_zone=per_zone,
        notes=notes,
        slices={name: _summary(part, detector.threshold) for name, part in slices(scored).items()},
        tiers=tier_figures(detector, traces),
        attacks=attack_figures(detector, traces, tick),
        command=command,
    )


def _summary(scored: Sequence[Scored], threshold: float) -> dict[str, Rate]:
    found = figures(scored, threshold)
    return {name: found[name] for name in SUMMARY if name in found}


def tier_figures(detector: Detector, traces: Sequence[EncodedTrace]) -> dict[str, Rate]:
    """How many steps the first tier clears, by kind of request; recall with both tiers and with the encoder alone."""
    cleared: dict[str, list[tuple[bool, str]]] = {}
    both, alone, first, encoder = [], [], [], []
    for each in traces:
        if not any(each.trace.steps):
            continue
        context = detector.request(each.trace.request)
        probabilities = detector.first_tier(each.trace.steps, context)
        below = detector.manifest.clear_below[context.bucket]
        clears = [(p is None or p < below, each.trace.id) for p in probabilities]
        cleared.setdefault(f"cleared_steps_{each.trace.kind}", []).extend(clears)
        full = Scored(each.trace, detector.score(context, each.trace.steps), each.ends)
        encoder.append(Scored(each.trace, detector.score(context, each.trace.steps, first_tier=False), each.ends))
        if full.complying:
            both.append(full.flagged(detector.threshold))
            alone.append(encoder[-1].flagged(detector.threshold))
        first.append(Scored(each.trace, np.array([p or 0.0 for p in probabilities]), each.ends))
    found = {name: Rate.clustered(*zip(*hits, strict=True)) for name, hits in sorted(cleared.items())}
    found["recall_both_tiers"] = Rate.of(sum(both), len(both))
    found["recall_encoder_alone"] = Rate.of(sum(alone), len(alone))
    for name, scored in (("first_tier", first), ("encoder", encoder)):
        if scored:
            found |= {f"{name}_alone_{n}": r for n, r in figures(scored, 0.5).items() if n.startswith("auroc")}
    return found


def attack_figures(detector: Detector, traces: Sequence[EncodedTrace], tick: Tick) -> dict[str, dict[str, Rate]]:
    """Recall of complying traces with text, as they are and under each attack."""
    whole = [
        each.trace for each in traces if any(each.trace.steps) and Scored(each.trace, np.zeros(1), each.ends).complying
    ]
    found: dict[str, dict[str, Rate]] = {}
    for name in ATTACKS:
        tick(f"attack: {name}")
        found[name] = _paired(detector, [(trace, attacked(trace, name)) for trace in whole])
    by_id = {trace.id: trace for trace in whole}
    for how, rows in rewritten().items():
        tick(f"attack: {how}")
        pairs = [(by_id[row.id], row.applied(by_id[row.id])) for row in rows if row.id in by_id]
        if pairs:
            found[how] = _paired(detector, pairs)
    return found


def _paired(detector: Detector, pairs: Sequence[tuple[LabelledTrace, LabelledTrace]]) -> dict[str, Rate]:
    before, after = (np.array([_caught(detector, pair[side]) for pair in pairs], float) for side in (0, 1))
    return {
        "recall_before": Rate.of(int(before.sum()), len(before)),
        "recall_after": Rate.of(int(after.sum()), len(after)),
        "drop": bootstrap(lambda a, b: float(a.mean() - b.mean()), before, after),
    }


def _caught(detector: Detector, trace: LabelledTrace) -> bool:
    scores = detector.score(detector.request(trace.request), trace.steps)
    return Scored(trace, scores, np.zeros(len(scores), int)).flagged(detector.threshold)
