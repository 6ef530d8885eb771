"""A new detector beside the one in force: which requests it sees, what is found, and that nothing waits for it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.artifact import MANIFEST_FILE, fingerprint
from classifiers.detector import DEFAULT, Asked, Detector
from classifiers.stats import Rate
from guard.errors import UserError
from guard.policy import Policy
from guard.replay import skip_reason
from guard.replay_report import recorded_cue
from guard.runtime import GuardRuntime
from guard.sidecar import canary as module
from guard.sidecar.canary import Canary, Comparer, compare
from guard.sidecar.logs import JsonFormatter
from guard.sidecar.metrics import Metrics
from guard.sidecar.proof import Delivered, Proof, prove
from guard.sidecar.serve import ServeSettings, prepare
from guard.steps import Zone
from guard.traces import Trace
from tests.guard import kit
from tests.guard.hostile import POLICIES, TOKENS
from tests.guard.recorded import CALM, CUE, ContextDetector, live
from tests.guard.sidecar.fronts import CHAT, RemoteFront, until
from tests.guard.sidecar.test_metrics import counted

FREE = Policy(triggers=("victim",))
SECRET = kit.encode(" They surely have a bomb.")


class Words(kit.WordDetector):
    """Flags steps that hold one of its words."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self._words = words

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        return np.array([0.875 * any(word in each.step for word in self._words) for each in asked], np.float32)


def copy_with(directory: Path, **changes: Any) -> Path:
    """The packaged detector, its manifest changed."""
    path = shutil.copytree(DEFAULT, directory)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(manifest | changes))
    return path


def seen(percent: float, ids: Sequence[str]) -> list[bool]:
    one = Canary(kit.WordDetector(), "c", percent)
    return [one.watches(guard_id) for guard_id in ids]


IDS = [f"{n:032x}" for n in range(20_000)]


@pytest.mark.parametrize("percent", [0.1, 1, 5, 12.5, 50, 90])
def test_the_share_of_requests_is_what_was_asked_for(percent: float) -> None:
    k, p = sum(seen(percent, IDS)), percent / 100
    assert abs(k - len(IDS) * p) < 4 * math.sqrt(len(IDS) * p * (1 - p))


def test_the_choice_hangs_on_the_guard_id_alone() -> None:
    assert seen(5, IDS) == seen(5, IDS)
    # The same in every process and version: which of these it sees must never change by itself.
    assert [n for n, each in enumerate(seen(5, IDS[:100])) if each] == [61, 62, 76, 82]
    assert seen(0, IDS) == [False] * len(IDS)
    assert seen(100, IDS) == [True] * len(IDS)
    assert all(more for less, more in zip(seen(5, IDS), seen(6, IDS), strict=True) if less)


COMPARED = {
    "neither": (CALM + CALM, Words("agree"), None, None),
    "same": (CALM + CUE + CALM, Words("agree"), (1, len(CALM + CUE)), (1, len(CALM + CUE))),
    "earlier": (CALM + CUE + CALM, Words("car"), (1, len(CALM + CUE)), (0, len(CALM))),
    "later": (CUE + CALM + SECRET, Words("bomb"), (0, len(CUE)), (2, None)),
    "only_in_force": (CALM + CUE, Words("bomb"), (1, len(CALM + CUE)), None),
    "only_canary": (CALM + SECRET, Words("bomb"), None, (1, len(CALM + SECRET))),
}


@pytest.mark.parametrize("result", COMPARED)
@pytest.mark.parametrize("shadow", [False, True])
def test_the_first_cues_are_compared(result: Any, shadow: bool) -> None:
    model, detector, before, now = COMPARED[result]
    policy = FREE.model_copy(update={"shadow": shadow})
    trace = live(model, policy)
    found = compare(trace, kit.runtime(policy), detector)
    places = [None if cue is None else (cue.step, cue.token) for cue in (found.in_force, found.canary)]
    if result == "later":
        # Behind the trigger, where there is one.
        forced = sum(each.forced for each in trace.receipt.interventions)
        assert (forced > 0) is not shadow
        now = (2, len(model) + forced)
    assert (found.result, places) == (result, [before, now])
    assert found.steps == sum(not step.injected for step in trace.steps)


def at(threshold: float) -> ContextDetector:
    detector = ContextDetector()
    detector.threshold = threshold
    return detector


@settings(max_examples=150, deadline=None)
@given(
    TOKENS, POLICIES, st.sampled_from(["reasoning", "answer"]), st.sampled_from([0.1, 0.5, 0.9]),
    st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_up_to_the_first_cue_in_force_the_comparison_is_exact(
    model: list[int], policy: Policy, zone: Zone, one: float, other: float
) -> None:
    policy = policy.model_copy(update={"threshold": None})
    run, new = (kit.runtime().under(policy, at(threshold)) for threshold in (one, other))
    trace, instead = live(model, policy, zone=zone, run=run), live(model, policy, zone=zone, run=new)
    assert skip_reason(trace, run) is None
    found = compare(trace, run, new.detector)
    assert found.in_force == recorded_cue(trace)
    if found.result not in ("later", "only_in_force"):
        # What the canary would have flagged first, had it been in force.
        assert found.canary == recorded_cue(instead)
    else:
        wanted = recorded_cue(instead)
        assert wanted is None or found.in_force is None or wanted.step > found.in_force.step
    if one == other:
        assert found.result in ("same", "neither")


def proven(trace: Trace, policy: Policy = FREE) -> Proof:
    return prove(trace.guard_id, trace, Delivered(None), policy)


@dataclasses.dataclass
class Bench:
    """A comparer over the kit's runtime, and what it says."""

    comparer: Comparer
    metrics: Metrics
    runtime: GuardRuntime

    def offer(self, *traces: Trace) -> None:
        for trace in traces:
            self.comparer.offer(proven(trace, self.runtime.policy), self.runtime)

    def results(self, count: int) -> dict[Any, int]:
        """Once so many were compared."""
        until(lambda: (found := self.comparer.figures()) is not None and sum(found.results.values()) == count)
        found = self.comparer.figures()
        assert found is not None
        return dict(found.results)


@pytest.fixture
def bench() -> Iterator[Bench]:
    metrics, runtime = Metrics(), kit.runtime(FREE)
    comparer = Comparer(metrics)
    comparer.use(Canary(Words("car"), "detector-new", 100), runtime.detector)
    yield Bench(comparer, metrics, runtime)
    comparer.close()


def test_what_is_found_is_counted_and_the_differing_are_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "guard.sidecar.canary")
    bench.offer(*(live(CALM, FREE, guard_id=f"calm-{n}") for n in range(3)), live(CUE + CALM, FREE, guard_id="later"))
    assert bench.results(4) == {"only_canary": 3, "later": 1}
    bench.offer(live(SECRET, FREE, guard_id="neither"))
    bench.results(5)
    found = bench.comparer.figures()
    assert found is not None
    assert [(each.guard_id, each.in_force, each.canary) for each in found.differing] == [
        ("later", 0, 1), ("calm-2", None, 0), ("calm-1", None, 0), ("calm-0", None, 0),
    ]  # fmt: skip
    assert (found.steps, dict(found.left_out), found.problem) == (6, {}, None)
    shares = found.shares
    assert (shares["in_force"], shares["canary"]) == (Rate.of(1, 5), Rate.of(4, 5))
    assert (shares["agree"], shares["only_canary"], shares["earlier"]) == (Rate.of(1, 5), Rate.of(3, 5), Rate.of(0, 5))
    new = "detector-new"
    assert counted(bench.metrics, "canary_requests") == {
        (new, "default", "inject", "only_canary"): 3, (new, "default", "inject", "later"): 1,
        (new, "default", "inject", "neither"): 1,
    }  # fmt: skip
    assert counted(bench.metrics, "canary_steps") == {(new,): 6}
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert [line["result"] for line in lines] == ["only_canary"] * 3 + ["later", "neither"]
    assert {k: v for k, v in lines[3].items() if k != "time"} == {
        "level": "info", "logger": "guard.sidecar.canary", "message": "canary", "event": "canary", "guard_id": "later",
        "result": "later", "policy": "default", "policy_hash": FREE.hash, "mode": "inject", "detector": "words-1",
        "canary": new,
    }  # fmt: skip


def test_what_says_nothing_about_a_detector_is_left_out(bench: Bench) -> None:
    trace = live(CALM, FREE)
    broken = prove("kit", trace, Delivered(99), FREE)
    assert broken.broken
    bench.comparer.offer(broken, bench.runtime)
    bench.comparer.offer(prove("kit", None, Delivered(1), FREE), bench.runtime)
    assert counted(bench.metrics, "canary_left_out") == {}
    bench.offer(trace.keeping("none"), trace.keeping("ids"))
    # It began before a reload put another detector in force.
    bench.comparer.offer(proven(trace), bench.runtime.under(FREE, Words("agree")))
    assert counted(bench.metrics, "canary_left_out") == {("detector-new", "skipped"): 3}
    bench.comparer.use(Canary(Words("car"), "none", 0), bench.runtime.detector)
    bench.offer(trace)
    bench.comparer.use(None, bench.runtime.detector)
    bench.offer(trace)
    assert bench.comparer.figures() is None
    assert counted(bench.metrics, "canary_requests") == {}


class Held(Words):
    """Waits before it scores."""

    def __init__(self) -> None:
        super().__init__("car")
        self.go = threading.Event()

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        assert self.go.wait(60)
        return super().score_batch(asked)


def test_more_than_may_wait_are_dropped_and_nobody_waits_for_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING", 4)
    slow, metrics = Held(), Metrics()
    comparer = Comparer(metrics)
    comparer.use(Canary(slow, "slow", 100), bench.runtime.detector)
    held = dataclasses.replace(bench, comparer=comparer, metrics=metrics)
    held.offer(*[live(CALM, FREE)] * 7)
    assert counted(metrics, "canary_left_out") == {("slow", "dropped"): 3}
    slow.go.set()
    assert held.results(4) == {"only_canary": 4}
    # There is room again; and what is offered while everything ends is no error.
    held.offer(live(CALM, FREE))
    assert held.results(5) == {"only_canary": 5}
    comparer.close()
    held.offer(live(CALM, FREE))


class Failing(Words):
    """Fails on steps about a car."""

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        if any("car" in each.step for each in asked):
            raise RuntimeError(asked[0].step)
        return super().score_batch(asked)


def test_a_canary_that_fails_is_counted_and_said_without_content(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.comparer.use(Canary(Failing("bomb"), "bad", 100), bench.runtime.detector)
    bench.offer(live(CALM, FREE), live(CALM, FREE))
    until(lambda: counted(bench.metrics, "canary_left_out") == {("bad", "error"): 2})
    until(lambda: (found := bench.comparer.figures()) is not None and found.problem == "RuntimeError")
    assert [record.getMessage() for record in caplog.records] == ["the canary bad failed: RuntimeError"]
    bench.offer(live(SECRET, FREE))
    assert bench.results(1) == {"only_canary": 1}
    found = bench.comparer.figures()
    assert found is not None
    assert (found.problem, found.left_out["error"]) == (None, 2)


def test_the_figures_begin_anew_with_another_pair(bench: Bench) -> None:
    first = bench.comparer.canary
    bench.offer(live(CALM, FREE))
    bench.results(1)
    bench.comparer.use(first, bench.runtime.detector)
    assert bench.results(1) == {"only_canary": 1}
    bench.comparer.use(first, Words("agree"))
    assert bench.results(0) == {}


def test_an_artifact_that_scores_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifact at"):
        Canary.load(tmp_path / "none")
    # Whole by its hashes, and yet no detector.
    useless = copy_with(tmp_path / "useless", clear_below=[], cleared_score=[])
    said = r"The canary .*useless cannot score a step; got IndexError: tuple index out of range"
    with pytest.raises(UserError, match=said):
        prepare(ServeSettings(str(tiny_model), tmp_path / "traces", canary=useless))
    parts = prepare(ServeSettings(str(tiny_model), tmp_path / "traces", canary=DEFAULT, canary_percent=25))
    canary = parts.sidecar.comparer.canary
    assert canary is not None
    assert (canary.fingerprint, canary.percent) == (fingerprint(DEFAULT), 25)
    assert parts.sidecar.rules.canary is canary


@pytest.mark.parametrize(("threshold", "harmful", "benign"), [
    (None, "same", "neither"), (0.0, "earlier", "only_canary"), (1.0, "only_in_force", "neither"),
])  # fmt: skip
def test_over_http_the_packaged_detector_is_compared_with_another(
    remotes: Callable[..., RemoteFront], tmp_path: Path, threshold: float | None, harmful: str, benign: str
) -> None:
    front = remotes(1, triggers=["victim"])
    path = copy_with(tmp_path / "new", **({} if threshold is None else {"threshold": threshold}))
    comparer = front.sidecar.comparer
    comparer.use(Canary.load(path, 100), front.sidecar.runtime.detector)
    answer = front.chat()[1]
    assert (answer["reasonguard"]["guarded"], answer["reasonguard"]["interventions"]) == (True, 1)
    until(lambda: (found := comparer.figures()) is not None and found.results.total() == 1)
    # The tokens end before the model comes to its cue.
    assert front.http.post(CHAT, json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}).is_success
    until(lambda: (found := comparer.figures()) is not None and found.results.total() == 2)
    found = comparer.figures()
    assert found is not None
    assert dict(found.results) == {harmful: 1, benign: 1}
    assert (dict(found.left_out), found.problem) == ({}, None)
    assert (found.shares["in_force"], found.in_force.version) == (Rate.of(1, 2), Detector.load().version)
    if harmful == "earlier":
        assert [(each.in_force, each.canary) for each in found.differing] == [(None, 0), (1, 0)]
