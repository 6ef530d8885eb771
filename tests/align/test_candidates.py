"""What is rolled out: seeded choices that must not change under a user, and what a cluster makes of them."""

from __future__ import annotations

import pytest

from align.candidates import RolloutSettings, candidates, one_by_one, place
from align.sources import from_traces
from guard.steps import TokenTable
from tests.align.kit import ENCODED, source, trace

#: 10 traces with an answered cue, 10 without any, 10 with one that nothing answered.
SOURCES, _ = from_traces([trace(f"g{n}", cue=n % 3 != 0, answered=n % 3 == 1) for n in range(30)])


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        (
            RolloutSettings(max_intervened=6, max_benign=5),
            "g1-sounds-wrong g6-be-careful g7-must-refuse g10-against-law g12-must-refuse g13-decline-kindly "
            "g18-stop-think g19-victim g21-decline-kindly g24-against-law g28-be-careful",
        ),
        (
            RolloutSettings(triggers=3, max_intervened=3, max_benign=2, seed=7),
            "g0-danger g3-be-careful g7-stop-think g7-not-part g7-victim g16-wait-harm g16-be-careful "
            "g16-sounds-wrong g19-wait-harm g19-stop-think g19-safe-reply",
        ),
    ],
)
def test_the_same_seed_gives_the_same_candidates_for_ever(settings: RolloutSettings, ids: str) -> None:
    found, left = candidates(SOURCES, ENCODED, settings)
    assert " ".join(c.id for c in found) == ids
    assert left == {
        f"intervened: source over the limit of {settings.max_intervened}": 10 - (settings.max_intervened or 0),
        f"benign: source over the limit of {settings.max_benign}": 10 - (settings.max_benign or 0),
    }
    by_kind = {c.kind: c for c in found}
    assert (by_kind["intervened"].prefix, by_kind["intervened"].source.own) == ([10, 11, 12], [13, 14, 15])
    assert (by_kind["benign"].prefix, by_kind["benign"].source.own) == ([10, 11, 12], [13, 14, 15, 16, 17, 18, 19])


def test_on_a_cluster_a_source_gets_its_triggers_whatever_comes_with_it() -> None:
    settings = RolloutSettings(triggers=4, max_intervened=0)
    together, _ = one_by_one(SOURCES, ENCODED, settings)
    alone = [c.id for s in reversed(SOURCES) for c in one_by_one([s], ENCODED, settings)[0]]
    assert sorted(c.id for c in together) == sorted(alone)
    assert len(alone) == 10 * 4 + 10
    other, _ = one_by_one(SOURCES, ENCODED, settings.model_copy(update={"seed": 1}))
    assert sorted(c.id for c in other) != sorted(alone)


def test_no_trigger_is_tried_twice_on_one_source() -> None:
    found, _ = candidates([source()], ENCODED, RolloutSettings(triggers=99))
    assert sorted(c.trigger.id for c in found) == sorted(t.id for t in ENCODED)


def test_a_trigger_brings_a_space_only_where_none_is() -> None:
    table = TokenTable([b"<think>", b"end.\n", b"", b" ", b"end."], frozenset([0, 2]))
    places = [place([4, token], table) for token in range(6)]
    assert places == ["plain", "plain", "plain", "plain", "spaced", "spaced"]
    assert place([], table) == "plain", "a zone's first text"


def test_a_settings_hash_changes_with_any_setting() -> None:
    base = RolloutSettings()
    others = [RolloutSettings(rounds=2), RolloutSettings(seed=1), RolloutSettings(quota={"per_tenant": 3})]
    assert len({s.hash for s in (base, *others)}) == 4
    assert base.hash == RolloutSettings().hash
