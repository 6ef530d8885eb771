"""Intervention rates by version and period: told by each trace's weights, and by time where a version came back."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.gate import GateSettings, decide
from align.status import per_1000, status
from align.versions import Event, put_in_force
from classifiers.stats import Rate
from guard.policy import Policy
from guard.traces import Intervention, Spool
from guard.weights import Manifest, Registry
from tests.align.runs import passing
from tests.guard.sidecar.scripted import trace_of


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Versions 1 and 2, in force from 100 and 200; back to 1 at 300."""
    registry = Registry(tmp_path / "versions")
    for number in (1, 2):
        registry.directory(number).mkdir(parents=True)
        manifest = Manifest(
            version=number, created=1.0, base="w0", base_name="m", weights=f"w{number}", files={}
        )  # fmt: skip
        (registry.directory(number) / "manifest.json").write_text(manifest.model_dump_json())
        verdict = decide(passing(), GateSettings())
        (registry.directory(number) / "gate.json").write_text(verdict.model_dump_json())
    put_in_force(registry, Event(time=100, event="promoted", version=1, before=0))
    put_in_force(registry, Event(time=200, event="promoted", version=2, before=1))
    put_in_force(registry, Event(time=300, event="rolled back", version=1, before=2))
    return registry


def log(spool: Path, weights: str, created: float, n: int, intervened: int, **receipt: object) -> None:
    done = Intervention(step=0, at=1, trigger_id="t", score=1.0)
    for i in range(n):
        trace = trace_of(f"{weights}-{created}-{i}", Policy(), interventions=[done] if i < intervened else [])
        changed = {"weights": weights, "created": created, "receipt": trace.receipt.model_copy(update=receipt)}
        Spool(spool).append(trace.model_copy(update=changed))


def test_rates_before_and_after_each_change(registry: Registry, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    log(spool, "w0", 50, 20, 10)
    # Ended on the old weights after the change: before it, all the same.
    log(spool, "w0", 101, 5, 5)
    log(spool, "w1", 150, 40, 4)
    log(spool, "w2", 250, 30, 0)
    log(spool, "w1", 350, 10, 3)
    log(spool, "w2", 260, 2, 2, policy="probe")
    log(spool, "w2", 261, 3, 3, shadow=True)
    log(spool, "", 50, 4, 4)
    log(spool, "else", 50, 6, 6)
    found = status(registry, spool)
    assert [(line.interventions_before, line.interventions_after) for line in found.lines] == [
        (per_1000([True] * 15 + [False] * 10), per_1000([True] * 4 + [False] * 36)),
        (per_1000([True] * 4 + [False] * 36), per_1000([False] * 30)),
        (per_1000([False] * 30), per_1000([True] * 3 + [False] * 7)),
    ]
    assert {version: (rate.rate, rate.n) for version, rate in found.interventions.items()} == {
        0: (600.0, 25), 1: (140.0, 50), 2: (0.0, 30),
    }  # fmt: skip
    assert found.left_out == {"probes and shadow mode": 5, "no weights hash": 4, "another model": 6}
    assert [line.gate for line in found.lines] == ["5 of 5 met", "5 of 5 met", ""]
    wilson = Rate.of(15, 25)
    assert found.lines[0].interventions_before == Rate(rate=600.0, lo=1000 * wilson.lo, hi=1000 * wilson.hi, n=25)


def test_without_traces_nothing_is_known(registry: Registry) -> None:
    found = status(registry, None)
    assert found.current == 1
    assert found.interventions == {}
    assert found.lines[0].interventions_after == Rate(rate=0.0, lo=0.0, hi=1000.0, n=0)


def test_an_empty_registry_has_a_status(tmp_path: Path) -> None:
    found = status(Registry(tmp_path / "none"), None)
    assert (found.current, found.versions, found.lines) == (0, [], [])
