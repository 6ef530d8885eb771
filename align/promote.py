"""From a measured run to a version in force, or to a refusal with its reasons; and the whole weekly run around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.disk import one_writer
from align.gate import GateSettings, Verdict, decide
from align.inherit import inherit
from align.markdown import load_report
from align.model_card import render_card
from align.standing import Standing, began, unmoved
from align.versions import Event, describe, find, history, locked, previous, publish, put_in_force, record, verdict_of
from align.watermark import Watermark
from guard.errors import UserError
from guard.weights import Registry, known_weights

if TYPE_CHECKING:
    from align.evaluate import EvalRequest
    from align.pipeline import AlignSettings, Workbench
    from guard.traces import Trace

Tell = Callable[[str], None]
Requests = Callable[["Workbench"], Sequence["EvalRequest"]]


class Outcome(NamedTuple):
    """What the gate said of a run, and the version that it became (None: refused)."""

    verdict: Verdict
    version: int | None


class Weekly(NamedTuple):
    """What a run from cron needs to know beside the run's own settings."""

    traces: Path
    versions: Path
    gate: GateSettings
    min_new: int
    """Fewer new intervened traces than this are no reason for a run."""
    accelerate: Path | None = None
    """See `align.train.train`."""


def promote(
    registry: Registry, run: Path, gate: GateSettings, *, force: bool = False, then: Standing | None = None
) -> Outcome:
    """Holds a run's report against the gate; what passes becomes a version and is put in force. A run that is in force
    already is left as it is. `then`: what was in force when it began, and must be still. UserError when the run is not
    finished."""
    from align.pipeline import AlignSettings

    report = load_report(run / "report.json")
    settings = AlignSettings.model_validate_json((run / "align.json").read_bytes())
    manifest = describe(registry, run, settings.model)
    serving, known = registry.current(), find(registry, run)
    passed = verdict_of(registry, serving)
    if passed is not None and known is not None and known.version == serving:
        return Outcome(passed, serving)
    now, name = time.time(), str(run.resolve())
    verdict = decide(report, gate, passed)
    if then is not None:
        verdict = verdict.and_also(unmoved(registry, then, name))
    if not verdict.passed and not force:
        event = Event(time=now, event="refused", version=None, before=serving, run=name, reasons=verdict.reasons)
        if not any(e.run == name and e.reasons == event.reasons for e in history(registry)[-1:]):
            record(registry, event)
        return Outcome(verdict, None)
    made = known or publish(registry, run, manifest, verdict, render_card(manifest, report, verdict, run))
    event = Event(
        time=now, event="promoted", version=made.version, before=serving, run=name, forced=not verdict.passed,
        reasons=verdict.reasons,
    )  # fmt: skip
    put_in_force(registry, event)
    return Outcome(verdict, made.version)


def roll_back(registry: Registry, to: int | None = None) -> Event:
    """Puts the version before the present one in force again, or the one that is named (0: the model as it came)."""
    serving = registry.current()
    target = previous(registry) if to is None else to
    event = Event(time=time.time(), event="rolled back", version=target, before=serving)
    put_in_force(registry, event)
    return event


def weekly(settings: AlignSettings, out: Path, plan: Weekly, requests: Requests, tell: Tell) -> Outcome | None:
    """The whole of `align` on the traces that no run has taken yet, and the gate at its end; None when there was
    nothing to do. Interrupted, it goes on where it stopped.

    The registry is locked at the end only, for a rollback must not wait for a training. What was put in force meanwhile
    was somebody's decision; the gate then refuses, so that it is not overruled unseen.
    """
    from align import pipeline

    base, registry = known_weights(settings.model, "--promote"), Registry(plan.versions)
    # Two at once would take the same traces.
    taken = UserError(f"Another weekly align is running for {plan.versions}", fix="Wait for it")
    with one_writer(plan.versions, taken, name=".weekly.lock"), pipeline.Workbench.open(settings, out) as bench:
        mark = Watermark(plan.versions, base)
        made = [registry.manifest(number) for number in registry.versions()]
        found = pipeline.collect(bench, plan.traces, [each.weights for each in made if each.base == base])
        if _nothing_to_do(mark, found, out, plan, tell):
            return None
        then = began(registry, out)
        own, asked = pipeline.make_pairs(bench, mark.take(found, out)), requests(bench)
        if (known := inherit(bench, asked, mark.runs)) is not None:
            tell(f"{known.replies} replies of the model as it came are those of {known.run}.")
        pipeline.train_and_measure(bench, [*own, *mark.earlier_pairs(out, own)], asked, plan.accelerate)
        with locked(plan.versions):
            outcome = promote(registry, out, plan.gate, then=then)
            mark.commit(out)
        return outcome


def _nothing_to_do(mark: Watermark, found: Sequence[Trace], out: Path, plan: Weekly, tell: Tell) -> bool:
    fresh = sum(bool(trace.receipt.interventions) for trace in mark.new(found))
    enough = fresh >= plan.min_new
    if mark.finished(out) and enough:
        raise UserError(
            f"{out} holds a finished run, and {fresh} intervened traces are new", fix="Choose another --out for them"
        )
    if enough or ((out / "taken.json").exists() and not mark.finished(out)):
        return False
    tell(f"Nothing to do: {fresh} new intervened traces in {plan.traces}, {plan.min_new} are wanted for a run.")
    return True
