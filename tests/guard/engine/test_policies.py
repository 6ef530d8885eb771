"""Several policies in one engine, on both model runners: what a request names applies to it, if the sidecar says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from classifiers.artifact import MANIFEST_FILE, fingerprint
from classifiers.detector import DEFAULT
from guard.engine.params import RequestArgs
from guard.engine.views import MAX_DETECTORS, Views
from guard.policy import Policy
from tests.conftest import Engine
from tests.guard import kit
from tests.guard.engine.conftest import EOS, REQUEST, Script
from tests.guard.engine.runners import Runner
from tests.guard.engine.test_live_engine import check_corrected

Make = Callable[..., Runner]
ONE = Policy(triggers=("victim",), ladder=("trigger",))
OTHER = Policy(name="other", triggers=("danger",), ladder=("trigger",))
SHADOW = Policy(name="watched", triggers=("victim",), shadow=True)
OPEN = Policy(name="open", fail_mode="open", ladder=("trigger",))
(VICTIM,), (DANGER,) = kit.runtime(ONE).triggers, kit.runtime(OTHER).triggers
T, D = list(VICTIM.spaced), list(DANGER.spaced)
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
SAID = [*CUE, *CALM, EOS]


def named(policy: Policy, tenant: str = "", secret: str = "s3cret") -> dict[str, str]:
    """What the sidecar sends."""
    return {"guard_secret": secret, "guard_policy": policy.canonical, "guard_tenant": tenant}


def play(it: Runner, steps: int) -> None:
    for _ in range(steps):
        it.step()


def check(it: Runner, name: str, output: list[int], policy: Policy, tenant: str = "") -> None:
    assert it.output[name][: len(output)] == output
    trace = it.traces()[name]
    assert (trace.tenant, trace.receipt.policy, trace.receipt.policy_hash) == (tenant, policy.name, policy.hash)
    assert (trace.receipt.clean, trace.receipt.shadow) == (True, policy.shadow)


def test_each_row_of_a_batch_follows_the_policy_it_names(either: Make) -> None:
    it = either(ONE, secret="s3cret")
    it.add("own", [*CUE, *CALM], **named(ONE))
    it.add("other", [*CUE, *CALM], **named(OTHER, "team-b"))
    it.add("watched", [*CUE, *CALM], **named(SHADOW, "team-c"))
    play(it, len(SAID) + max(len(T), len(D)))
    it.close()
    check(it, "own", [*CUE, *T, *CALM, EOS], ONE)
    check(it, "other", [*CUE, *D, *CALM, EOS], OTHER, "team-b")
    check(it, "watched", SAID, SHADOW, "team-c")


@pytest.mark.parametrize("wrong", [
    {}, {"guard_policy": SHADOW.canonical, "guard_tenant": "forged"}, named(SHADOW, "forged", "guess"),
    named(SHADOW, "forged", ""), {"guard_secret": "s3cret "},
])  # fmt: skip
def test_who_lacks_the_secret_gets_the_engines_policy_at_its_strictest(either: Make, wrong: dict[str, str]) -> None:
    lax = ONE.model_copy(update={"shadow": True, "fail_mode": "open"})
    it = either(lax, secret="s3cret")
    it.add("x", [*CUE, *CALM], **wrong)
    it.add("ours", [*CUE, *CALM], guard_secret="s3cret", guard_tenant="team-a")
    play(it, len(SAID) + len(T))
    it.close()
    check(it, "x", [*CUE, *T, *CALM, EOS], ONE)
    check(it, "ours", SAID, lax, "team-a")


def test_without_a_secret_nobody_can_name_a_policy(either: Make) -> None:
    it = either(ONE)
    it.add("x", [*CUE, *CALM], **named(SHADOW, "forged"))
    it.add("empty", [*CUE, *CALM], **named(SHADOW, "forged", ""))
    play(it, len(SAID) + len(T))
    it.close()
    for name in ("x", "empty"):
        check(it, name, [*CUE, *T, *CALM, EOS], ONE)


@pytest.mark.parametrize(("policy", "said"), [
    ("{}}", "policy: ValidationError: 1 validation error for Policy"),
    ('{"shadow": true, "treshold": 1}', "policy: ValidationError: 1 validation error for Policy\ntreshold"),
    ('{"triggers": ["none"]}', "policy: UserError: Policy key `triggers`: unknown trigger id; got none"),
])  # fmt: skip
def test_a_policy_that_cannot_be_read_is_answered_strictly_and_recorded(either: Make, policy: str, said: str) -> None:
    it = either(SHADOW, secret="s3cret")
    it.add("x", [*CUE, *CALM], guard_secret="s3cret", guard_policy=policy)
    play(it, len(SAID) + len(T))
    it.close()
    assert it.output["x"] == [*CUE, *T, *CALM, EOS]
    receipt = it.traces()["x"].receipt
    assert (receipt.policy_hash, receipt.clean) == (SHADOW.strict.hash, False)
    assert receipt.errors[0].startswith(said)


def test_each_fail_mode_is_its_own_requests(either: Make) -> None:
    it = either(ONE, secret="s3cret")
    it.add("closed", CALM, **named(ONE))
    it.add("open", CALM, **named(OPEN))
    play(it, 2)
    for name in ("closed", "open"):
        it.say(name, [-1])
    it.step()
    assert it.output["closed"][-1] == EOS
    assert it.output["open"][-1] == CALM[2]


def test_a_preempted_request_comes_back_under_its_own_policy(runner: Make) -> None:
    it = runner(ONE, secret="s3cret")
    it.add("moves", [*CUE, *CALM], **named(OTHER, "team-b"))
    it.add("stays", [*CALM, *CALM], **named(ONE))
    play(it, len(CUE) + 2)
    it.free_slot("moves")  # type: ignore[attr-defined]
    it.step()
    it.add("moves", [], **named(OTHER, "team-b"))
    play(it, len(D) + len(CALM))
    it.close()
    check(it, "moves", [*CUE, *D, *CALM], OTHER, "team-b")


def test_a_probe_stands_on_the_policy_it_names(either: Make) -> None:
    it = either(ONE, secret="s3cret")
    it.add("p", CALM, guard_probe="s3cret", guard_policy=OTHER.canonical)
    it.add("plain", CALM, guard_probe="s3cret")
    play(it, 3)
    it.close()
    assert (it.output["p"][1], it.output["plain"][1]) == (D[0], T[0])
    assert it.traces()["p"].receipt.policy == "probe"


def eager(directory: Path, threshold: float = 0.0) -> str:
    """The packaged detector with another threshold, in a directory that has its fingerprint as name."""
    copy = shutil.copytree(DEFAULT, directory / "new")
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest | {"threshold": threshold}))
    named = fingerprint(copy)
    assert named != fingerprint(DEFAULT)
    copy.rename(directory / named)
    return named


def test_a_detector_is_named_by_everything_that_decides(either: Make, tmp_path: Path) -> None:
    detectors = tmp_path / "detectors"
    detectors.mkdir()
    named_detector = eager(detectors)
    it = either(ONE, secret="s3cret", detectors=detectors)
    it.add("new", [*CALM, *CALM], guard_secret="s3cret", guard_detector=named_detector)
    it.add("old", [*CALM, *CALM], guard_secret="s3cret")
    it.add("forged", [*CALM, *CALM], guard_detector=named_detector)
    play(it, len(CALM) + 1)
    it.close()
    assert [it.output[n][len(CALM)] for n in ("new", "old", "forged")] == [VICTIM.ids("spaced")[0], CALM[0], CALM[0]]
    version = json.loads((DEFAULT / MANIFEST_FILE).read_text())["version"]
    assert [it.traces()[n].receipt.detector for n in ("new", "old", "forged")] == [version, "words-1", "words-1"]


@pytest.mark.parametrize("bad", ["none", "..", "../detectors", "", "."])
def test_a_detector_that_is_not_there_is_recorded_and_the_old_one_decides(tmp_path: Path, bad: str) -> None:
    problems: list[str] = []
    views = Views(kit.runtime(SHADOW), "s3cret", tmp_path)
    args = RequestArgs(guard_secret="s3cret", guard_policy=OPEN.canonical, guard_detector=bad)
    found = views.of(args, problems)
    assert (found.policy, found.detector.version) == (SHADOW.strict, "words-1")
    assert len(problems) == 1
    assert problems[0].startswith("policy: UserError: ")


def test_a_detector_under_anothers_name_is_refused(tmp_path: Path) -> None:
    named_detector = eager(tmp_path)
    (tmp_path / named_detector).rename(tmp_path / "detector-000000000000")
    problems: list[str] = []
    args = RequestArgs(guard_secret="s3cret", guard_detector="detector-000000000000")
    assert Views(kit.runtime(ONE), "s3cret", tmp_path).of(args, problems).detector.version == "words-1"
    assert "is not the detector that its name says; got " + named_detector in problems[0]


def test_views_share_tables_and_detectors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views, problems, read = Views(kit.runtime(ONE), "s3cret", tmp_path), [], []
    monkeypatch.setattr(
        "guard.engine.views.Detector.load", lambda path, _: read.append(path.name) or kit.WordDetector()
    )
    monkeypatch.setattr("guard.engine.views.fingerprint", lambda path: path.name)

    def view(policy: Policy, detector: str) -> Any:
        args = RequestArgs(guard_secret="s3cret", guard_policy=policy.canonical, guard_detector=detector)
        return views.of(args, problems)

    first, second = view(ONE, "a"), view(OTHER, "a")
    assert (first.table is second.table, first.detector is second.detector, read) == (True, True, ["a"])
    assert view(ONE, "a") is first
    assert (first.triggers, second.triggers) == ((VICTIM,), (DANGER,))
    for n in range(MAX_DETECTORS):
        view(ONE, f"b{n}")
    view(SHADOW, "a")
    assert read == ["a", "b0", "b1", "b2", "a"]
    assert problems == []


def test_the_real_engine_runs_three_policies_in_one_batch(engine: Engine, script: Script) -> None:
    one = Policy(name="one", triggers=("victim",))
    rows = [(policy, tenant, {**named(policy, tenant)}) for policy, tenant in [
        (one, "team-a"), (SHADOW, "team-b"), (Policy(name="quiet", log_content="none"), "team-c"),
    ]]  # fmt: skip
    replies = engine.run([(REQUEST, {"extra_args": extra}) for *_, extra in rows] + [(REQUEST, {})])
    traces = [reply.trace for reply in replies]
    assert [(t.tenant, t.receipt.policy_hash) for t in traces if t] == [
        *((tenant, policy.hash) for policy, tenant, _ in rows), ("", Policy().hash),
    ]  # fmt: skip
    (victim,) = (t for t in engine.guard._runtime.triggers if t.id == "victim")
    assert replies[0].ids == script.corrected(victim.spaced)
    assert replies[1].ids == script.comply
    assert replies[2].ids != script.comply
    assert traces[2] is not None
    assert (traces[2].request, traces[2].output_ids) == ("", [])
    check_corrected(engine, script, replies[3])
