"""Which pairs are trained on: the share of benign ones, and a run's own before those of earlier runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from align.pairs import Pair
from align.train import TrainSettings, mix
from tests.align.runs import pair


def made(name: str, intervened: int, benign: int, *, earlier: bool = False) -> list[Pair]:
    kinds = ["intervened"] * intervened + ["benign"] * benign
    return [pair(f"{name}-{n}").model_copy(update={"kind": k, "earlier": earlier}) for n, k in enumerate(kinds)]


def names(pairs: list[Pair]) -> set[str]:
    return {p.guard_id for p in pairs}


def test_a_runs_own_pairs_are_trained_on_before_earlier_ones() -> None:
    own, earlier = made("own", 20, 10), made("earlier", 600, 300, earlier=True)
    chosen = mix([*earlier, *own], TrainSettings())
    assert (len(chosen), sum(p.kind == "benign" for p in chosen)) == (120, 48)
    assert names(own) <= names(chosen)
    assert mix([*earlier, *own], TrainSettings()) == chosen
    # What fills up is drawn by chance.
    other = mix([*earlier, *own], TrainSettings(seed=1))
    assert names(own) <= names(other) != names(chosen)


def test_own_pairs_beyond_the_maximum_leave_no_room_for_earlier_ones() -> None:
    own, earlier = made("own", 200, 20), made("earlier", 50, 50, earlier=True)
    chosen = mix([*own, *earlier], TrainSettings())
    assert {(p.kind, p.earlier) for p in chosen} == {("intervened", False), ("benign", False), ("benign", True)}
    assert sum(not p.earlier for p in chosen if p.kind == "benign") == 20


def test_what_the_stage_before_refuses_comes_before_what_it_answers() -> None:
    """A refusal of an earlier run's request teaches more than a request of this run that is answered."""
    refused, answered = made("refused", 0, 3, earlier=True), made("answered", 0, 40)
    answered = [pair.model_copy(update={"answered": True}) for pair in answered]
    chosen = mix([*answered, *refused, *made("own", 40, 0)], TrainSettings(benign_share=0.2))
    benign = [pair for pair in chosen if pair.kind == "benign"]
    assert (len(chosen), len(benign)) == (50, 10)
    assert sum(not pair.answered for pair in benign) == 3
    fewer = mix([*answered, *refused, *made("own", 40, 0)], TrainSettings(benign_share=0.2, max_pairs=15))
    assert names([pair for pair in fewer if pair.kind == "benign"]) == names(refused)


@given(*[st.integers(0, 40)] * 4, st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0]), st.integers(1, 60))
def test_earlier_pairs_change_neither_the_share_nor_what_is_own(
    i: int, b: int, old_i: int, old_b: int, share: float, most: int
) -> None:
    settings = TrainSettings(benign_share=share, max_pairs=most)
    own, earlier = made("own", i, b), made("earlier", old_i, old_b, earlier=True)
    chosen = mix([*own, *earlier], settings)
    assert len(chosen) == len(mix(made("any", i + old_i, b + old_b), settings)) <= most
    for kind, mine in (("intervened", i), ("benign", b)):
        of_kind = [p for p in chosen if p.kind == kind]
        assert sum(not p.earlier for p in of_kind) == min(mine, len(of_kind))
