"""Aligned versions with their rates before and after, from the store: what `align status` says of a spool."""

from __future__ import annotations

from dataclasses import dataclass, replace

from align.status import gate_of
from align.versions import Event, history
from classifiers.stats import Rate
from guard.sidecar.pages.queries import counts
from guard.store.reading import Filter
from guard.store.store import Store
from guard.weights import BASE, Registry

_COUNTED = Filter(shadow=False)


@dataclass(frozen=True)
class Change:
    """One line of the history: the event, what its gate said, the share of intervened requests before and after."""

    event: Event
    gate: str
    before: Rate | None
    after: Rate | None


def changes(store: Store, registry: Registry) -> list[Change]:
    """The history with rates, the newest first. UserError when a manifest is damaged."""
    events = history(registry)
    made = [event for event in events if event.version is not None]
    weights = _weights(registry)
    found = []
    for event in events:
        before = after = None
        if event.version is not None:
            at = made.index(event)
            before, after = (_rate(store, made, period, weights) for period in (at - 1, at))
        found.append(Change(event, gate_of(registry, event), before, after))
    return found[::-1]


def _weights(registry: Registry) -> dict[int, set[str]]:
    """The hashes of each version's weights; the model as it came is what the versions were made from."""
    found: dict[int, set[str]] = {BASE: set()}
    for number in registry.versions():
        manifest = registry.manifest(number)
        found[BASE].add(manifest.base)
        found[number] = {manifest.weights}
    return found


def _rate(store: Store, made: list[Event], period: int, weights: dict[int, set[str]]) -> Rate | None:
    """Of the requests that a change's weights answered, until they were put in force again; -1: before any change.

    The weights tell the version; the time only tells two periods of one version apart.
    """
    version = BASE if period < 0 else made[period].version or BASE
    again = [event.time for event in made[period + 1 :] if event.version == version]
    since = None if period < 0 else made[period].time
    wanted = replace(_COUNTED, since=since, until=again[0] if again else None)
    rows = [row for each in weights.get(version, ()) for row in counts(store, replace(wanted, weights=each))]
    requests = sum(row.requests for row in rows)
    return Rate.of(sum(row.intervened for row in rows), requests) if requests else None
