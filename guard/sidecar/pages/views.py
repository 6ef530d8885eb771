"""What each page shows. Every function runs in a thread of the site's pool and answers one request."""

from __future__ import annotations

import json
from typing import get_args
from urllib.parse import quote, urlencode

from starlette.responses import Response

from guard.sidecar.pages import queries, rates
from guard.sidecar.pages.site import Asked, NotFound, Site, render, to
from guard.sidecar.pages.steps import Shown, shown_steps, why_no_text
from guard.store import reading, reviews
from guard.store.reading import Filter
from guard.store.reviews import JUDGED, KindLabel, Label, Review
from guard.traces import Trace

WINDOWS = {"1h": 3600.0, "24h": 86_400.0, "7d": 7 * 86_400.0, "30d": 30 * 86_400.0, "all": None}
PARTS = 48
STEPS = 200
"""Steps on one page of a trace."""
BEFORE = 4
"""Steps that the queue shows before the one it asks about."""
_LABELS: dict[str, Label] = {name: name for name in (*JUDGED, "skip", *get_args(KindLabel))}


def overview(site: Site, asked: Asked) -> Response:
    """Rates over a window, together and by group, and what the sidecar has measured since it started."""
    window = _one_of(asked.query.get("window"), list(WINDOWS), "24h")
    by = _one_of(asked.query.get("by"), list(queries.GROUPS), "policy")
    wanted, seconds = _window(site, window), WINDOWS[window]
    now = site.now()
    total = queries.counts(site.store, wanted)[0]
    groups = queries.counts(site.store, wanted, by)
    version_of = site.version_names()
    since = now - seconds if seconds else rates.first_day(site.store, now)
    return render(
        "overview.html.j2", asked, window=window, windows=list(WINDOWS), by=by, groups_by=list(queries.GROUPS),
        refresh=asked.query.get("refresh") == "30", total=total,
        groups=[(rates.name_of(by, each.key, version_of), each) for each in groups],
        course=rates.bars(queries.course(site.store, wanted, since, now, PARTS)), since=since, now=now,
        measured=rates.measured(site.sidecar.metrics), spent=rates.guard_time(queries.guard_times(site.store, wanted)),
    )  # fmt: skip


def traces(site: Site, asked: Asked) -> Response:
    """One page of the traces that pass a filter, the newest first."""
    chosen = {name: asked.query.get(name, "") for name in ("tenant", "weights", "window", "intervened", "unscored")}
    chosen["window"] = _one_of(chosen["window"], list(WINDOWS), "all")
    window = _window(site, chosen["window"])
    wanted = Filter(
        since=window.since, weights=chosen["weights"] or None, intervened=chosen["intervened"] == "1",
        tenant=chosen["tenant"].removeprefix("=") if chosen["tenant"] else None, unscored=chosen["unscored"] == "1",
    )  # fmt: skip
    found = queries.listed(site.store, wanted, _cursor(asked.query.get("before", "")))
    kept = {name: value for name, value in chosen.items() if value}
    older = None
    if found.after is not None:
        older = urlencode({**kept, "before": f"{found.after[0]!r} {found.after[1]}"})
    return render(
        "traces.html.j2", asked, found=found, chosen=chosen, older=older, newest=urlencode(kept), windows=list(WINDOWS),
        tenants=queries.distinct(site.store, "tenant"), version_of=site.version_names(),
        weights=queries.distinct(site.store, "weights"), first="before" not in asked.query,
    )  # fmt: skip


def trace(site: Site, asked: Asked) -> Response:
    """One trace: its request, its steps, its receipt."""
    found = _find(site, asked.path["guard_id"])
    first = max(0, _number(asked.query.get("from", "0")))
    rows, request, why = _read(site, found)
    spare = {"interventions", "errors"}
    return render(
        "trace.html.j2", asked, trace=found, request=request, why=why, rows=_part(rows, first), first=first,
        more=first + STEPS if len(found.steps) > first + STEPS else None, version_of=site.version_names(),
        receipt=json.dumps(found.receipt.model_dump(exclude=spare), indent=1, ensure_ascii=True),
        kind=_kind(site, found), here_path=f"/traces/{quote(found.guard_id, safe='')}",
    )  # fmt: skip


def queue(site: Site, asked: Asked) -> Response:
    """The step that the detector doubts most, or one that is named, with what came before it."""
    threshold = site.sidecar.runtime.threshold
    waiting = queries.next_step(site.store, asked.reviewer, threshold, site.tokenizer_hash)
    named = asked.query.get("trace"), _number(asked.query.get("step", "-1"))
    guard_id, index = named if named[0] else (waiting.guard_id, waiting.step) if waiting else (None, -1)
    last = reviews.last_of(site.store, asked.reviewer)
    if guard_id is None:
        return render("queue.html.j2", asked, row=None, last=last, waiting=0)
    found = _find(site, guard_id)
    rows, request, why = _read(site, found)
    place = next((n for n, each in enumerate(rows) if each.index == index), None)
    if place is None:
        raise NotFound(f"Trace {guard_id} has no step {index}.")
    return render(
        "queue.html.j2", asked, trace=found, request=request, why=why, row=rows[place], last=last,
        before=rows[max(0, place - BEFORE) : place], left_out=max(0, place - BEFORE), threshold=threshold,
        kind=_kind(site, found), waiting=waiting.count if waiting else 0, named=named[0] is not None,
    )  # fmt: skip


def versions(site: Site, asked: Asked) -> Response:
    """The registry that `serve --versions` follows, with rates before and after each change."""
    registry = site.registry
    if registry is None:
        return render("versions.html.j2", asked, changes=None, current=0, serving=0, problem=None)
    from guard.sidecar.pages.versions import changes

    followed = site.sidecar.versions
    return render(
        "versions.html.j2", asked, changes=changes(site.store, registry), current=registry.current(),
        serving=followed.serving.version if followed else None, problem=followed.problem if followed else None,
    )  # fmt: skip


def canary(site: Site, asked: Asked) -> Response:
    """What `serve --canary` has found of a new detector, beside the one in force."""
    return render("canary.html.j2", asked, figures=site.sidecar.comparer.figures())


def label(site: Site, asked: Asked) -> Response:
    """Keeps a label and goes on: to the next step of the queue, or back to the trace."""
    guard_id, name = asked.form.get("guard_id", ""), asked.form.get("label", "")
    step = None if asked.form.get("step", "") == "" else _number(asked.form["step"])
    found = _find(site, guard_id)
    fits = name in _LABELS and (name in get_args(KindLabel)) == (step is None)
    if not fits or not (step is None or 0 <= step < len(found.steps)):
        raise NotFound("There is no such label, or no such step.")
    reviews.add(site.store, guard_id, step, _LABELS[name], asked.reviewer)
    if asked.form.get("back") == "trace":
        return to(_place(guard_id, step))
    here = _number(asked.form.get("at", "-1"))
    return to(f"/review?trace={quote(guard_id, safe='')}&step={here}" if step is None else "/review")


def undo(site: Site, asked: Asked) -> Response:
    """Takes back the reviewer's own label that the form names, and shows its step again."""
    taken = reviews.undo(site.store, asked.reviewer, _number(asked.form.get("review", "-1")))
    if taken is None:
        return to("/review")
    if taken.step is None or asked.form.get("back") == "trace":
        return to(_place(taken.guard_id, taken.step))
    return to(f"/review?trace={quote(taken.guard_id, safe='')}&step={taken.step}")


def _part(rows: list[Shown], first: int) -> list[Shown]:
    """The rows of the steps from `first` on, what is unwatched behind a step with it."""
    kept, at = [], 0
    for row in rows:
        at = at if row.index is None else row.index
        if first <= at < first + STEPS:
            kept.append(row)
    return kept


def _read(site: Site, found: Trace) -> tuple[list[Shown], str | None, str | None]:
    """A trace's rows, its request (None: it cannot be known), and why there is no text."""
    why = why_no_text(found, found.tokenizer_hash == site.tokenizer_hash)
    decode = site.decode if why is None else None
    request: str | None = found.request
    if found.log_content != "full":
        request = decode(found.prompt_ids) if decode is not None else None
    return shown_steps(found, decode, reviews.standing(site.store, [found.guard_id])), request, why


def _kind(site: Site, found: Trace) -> Review | None:
    """The newest word on what the request is."""
    said = reviews.standing(site.store, [found.guard_id])
    return next((each for each in reversed(said) if each.step is None and each.label in get_args(KindLabel)), None)


def _find(site: Site, guard_id: str) -> Trace:
    found = reading.find(site.store, guard_id)
    if found is None:
        raise NotFound(f"The store has no trace {guard_id[:100]}.")
    return found


def _window(site: Site, name: str) -> Filter:
    seconds = WINDOWS[name]
    return Filter(since=None if seconds is None else site.now() - seconds)


def _one_of(given: str | None, known: list[str], usual: str) -> str:
    return given if given in known else usual


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1


def _cursor(text: str) -> tuple[float, str] | None:
    moment, _, guard_id = text.partition(" ")
    try:
        return (float(moment), guard_id) if guard_id else None
    except ValueError:
        return None


def _place(guard_id: str, step: int | None) -> str:
    place = f"/traces/{quote(guard_id, safe='')}"
    if step is None:
        return f"{place}#request"
    return f"{place}?from={step // STEPS * STEPS}#s{step}" if step >= STEPS else f"{place}#s{step}"
