"""What an operator's files say, read as a whole; and detectors put where the engine finds them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from classifiers.artifact import MANIFEST_FILE, fingerprint
from classifiers.detector import DEFAULT
from guard.errors import UserError
from guard.keys import hash_of
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.rules import RulesReader, Sources, publish
from guard.sidecar.tenants import Tenant, holder


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A policy, two keys and a copy of the packaged detector."""
    (tmp_path / "policy.yaml").write_text("name: served\n")
    (tmp_path / "strict.yaml").write_text("name: strict\nthreshold: 0.25\nladder: [refuse]\ntriggers: [victim]\n")
    keys = [
        {"name": "a", "hash": hash_of("rg-a"), "policy": "strict.yaml", "quotas": {"concurrent": 3}},
        {"name": "b", "hash": hash_of("rg-b"), "shadow": True},
    ]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    detector = shutil.copytree(DEFAULT, tmp_path / "detector")
    return Sources(tmp_path / "policy.yaml", detector, tmp_path / "keys.yaml", tmp_path / "detectors")


def change_threshold(sources: Sources, threshold: float) -> None:
    assert sources.detector is not None
    manifest = sources.detector / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"threshold": threshold}))


def test_keys_have_views_of_one_runtime(sources: Sources, runtime: GuardRuntime) -> None:
    rules = RulesReader(sources, runtime).read()
    assert rules.keys is not None
    a, b = rules.keys[hash_of("rg-a")], rules.keys[hash_of("rg-b")]
    assert (rules.default.name, rules.default.policy, rules.default.detector) == ("", Policy(name="served"), None)
    assert (a.name, a.policy.name, a.runtime.threshold, a.quotas.concurrent) == ("a", "strict", 0.25, 3)
    assert [trigger.id for trigger in a.runtime.triggers] == ["victim"]
    assert b.policy == Policy(name="served", shadow=True)
    assert a.runtime.table is b.runtime.table is runtime.table
    assert a.runtime.detector is runtime.detector
    assert rules.distinct == [rules.default, a, b]


def test_without_a_file_of_keys_nobody_is_asked(sources: Sources, runtime: GuardRuntime) -> None:
    assert RulesReader(Sources(sources.policy), runtime).read().keys is None
    assert sources.keys is not None
    sources.keys.write_text("")
    assert RulesReader(sources, runtime).read().keys == {}


@pytest.mark.parametrize(("file", "text", "said"), [
    ("policy.yaml", "treshold: 1", "key `treshold`: Extra inputs are not permitted"),
    ("strict.yaml", "triggers: [none]", "Policy key `triggers`: unknown trigger id; got none"),
    ("strict.yaml", "ladder: [stop]", "Policy key `ladder`: `stop` needs an end-of-turn token, and tiny names none"),
    ("keys.yaml", "keys: {}", "key `keys`: Input should be a valid tuple"),
    ("detector/manifest.json", "{", "is malformed"),
])  # fmt: skip
def test_what_is_wrong_with_one_file_is_wrong_with_all(
    sources: Sources, runtime: GuardRuntime, tmp_path: Path, file: str, text: str, said: str
) -> None:
    reader = RulesReader(sources, runtime)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as caught:
        reader.read()
    assert said in str(caught.value)


def test_a_changed_detector_is_published_under_its_fingerprint(sources: Sources, runtime: GuardRuntime) -> None:
    reader = RulesReader(sources, runtime)
    assert sources.detectors is not None
    assert sources.detector is not None
    assert reader.read().default.detector is None
    assert not sources.detectors.exists()
    change_threshold(sources, 0.125)
    rules = reader.read()
    named = fingerprint(sources.detector)
    assert [each.name for each in sources.detectors.iterdir()] == [named]
    assert fingerprint(sources.detectors / named) == named
    assert rules.keys is not None
    for tenant in (rules.default, *rules.keys.values()):
        assert tenant.detector == named
        assert tenant.runtime.detector is rules.default.runtime.detector
    assert (rules.default.runtime.threshold, rules.keys[hash_of("rg-a")].runtime.threshold) == (0.125, 0.25)
    assert reader.read().default.runtime.detector is rules.default.runtime.detector
    # What was published stays as it was when its source changes, or goes back.
    change_threshold(sources, runtime.detector.threshold)
    shutil.copyfile(DEFAULT / MANIFEST_FILE, sources.detector / MANIFEST_FILE)
    assert reader.read().default.detector is None
    assert json.loads((sources.detectors / named / MANIFEST_FILE).read_text())["threshold"] == 0.125


def test_a_damaged_detector_is_not_published(sources: Sources, runtime: GuardRuntime) -> None:
    reader = RulesReader(sources, runtime)
    assert sources.detectors is not None
    assert sources.detector is not None
    change_threshold(sources, 0.125)
    with (sources.detector / "head.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is damaged"):
        reader.read()
    assert not sources.detectors.exists()
    with pytest.raises(UserError, match="cannot be copied"):
        publish(DEFAULT, sources.keys or DEFAULT)


def test_a_canary_is_loaded_again_only_where_it_is_another(
    sources: Sources, runtime: GuardRuntime, tmp_path: Path
) -> None:
    path = shutil.copytree(DEFAULT, tmp_path / "canary")
    reader = RulesReader(replace(sources, canary=path, canary_percent=20), runtime)
    canary = reader.read().canary
    assert canary is not None
    assert (canary.fingerprint, canary.percent) == (fingerprint(DEFAULT), 20)
    assert canary.detector is not runtime.detector
    assert reader.read().canary is canary
    change_threshold(replace(sources, detector=path), 0.125)
    other = reader.read()
    assert other.canary is not None
    assert (other.canary.fingerprint, other.canary.detector.threshold) == (fingerprint(path), 0.125)
    # It decides nothing, so the engine needs no copy of it.
    assert (other.default.detector, other.default.runtime.detector) == (None, runtime.detector)
    assert not (tmp_path / "detectors").exists()
    change_threshold(replace(sources, detector=path), 0.25)
    (path / "head.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"canary/head.onnx is damaged"):
        reader.read()


def test_a_key_is_found_by_its_hash_alone(runtime: GuardRuntime) -> None:
    keys = {hash_of("rg-a"): Tenant("a", runtime), hash_of("rg-b"): Tenant("b", runtime)}
    found = [holder(keys, f"Bearer {key}") for key in ("rg-a", "rg-b", "rg-c", "", hash_of("rg-a"))]
    assert [each and each.name for each in found] == ["a", "b", None, None, None]
    assert [holder(keys, text) for text in ("", "rg-a", "Basic rg-a", "Bearerrg-a")] == [None] * 4
    assert holder({}, "Bearer rg-a") is None
