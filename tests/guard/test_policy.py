from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guard.errors import UserError
from guard.policy import Policy, load_policy
from guard.steps import StepLimits

#: One other valid value for every field.
OTHER: dict[str, Any] = {
    "name": "strict", "version": 2, "zones": ("reasoning", "answer"), "threshold": 0.25, "shadow": True,
    "ladder": ("trigger", "stop"), "min_step_chars": 13, "max_step_tokens": 95, "triggers": ("victim",),
    "fail_mode": "open", "unreadable": "flag", "log_content": "none",
}  # fmt: skip
BAD = [
    ("name", "[a]"), ("version", "one"), ("version", "1.5"), ("zones", "thinking"), ("zones", "[]"),
    ("zones", "[answer, all]"),
    ("threshold", "1.01"), ("threshold", "-0.1"), ("threshold", ".nan"), ("threshold", "high"), ("mode", "replace"),
    ("shadow", "perhaps"), ("ladder", "[trigger, shout]"), ("ladder", "3"), ("min_step_chars", "0"),
    ("min_step_chars", "201"), ("max_step_tokens", "7"), ("max_step_tokens", "513"), ("triggers", "{a: b}"),
    ("triggers", "[1]"), ("fail_mode", "ajar"), ("log_content", "some"), ("treshold", "0.5"), ("hash", "abc"),
]  # fmt: skip


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_is_the_default_policy() -> None:
    assert load_policy(None) == Policy()
    assert Policy().limits == StepLimits(12, 96)


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.yaml", "name: strict\nzones: [reasoning, answer]\nthreshold: 0.25\ntriggers: [victim]\n"
    )
    policy = load_policy(path)
    assert policy == Policy(name="strict", zones=("reasoning", "answer"), threshold=0.25, triggers=("victim",))


def test_an_empty_file_is_the_default_policy(tmp_path: Path) -> None:
    assert load_policy(written(tmp_path / "p.yaml", "# nothing yet\n")) == Policy()


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_malformed_key_is_named(tmp_path: Path, key: str, value: str) -> None:
    path = written(tmp_path / "p.yaml", f"{key}: {value}\n")
    with pytest.raises(UserError, match=rf"key `{key}[.`]") as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "got list"),
        ("a: [\n", "is not YAML"),
        ("5\n", "got int"),
        ("1: 2\n", "key `"),
        ("a: \x00\n", "is not YAML"),
        ("name: x\nfail_mode: closed\nfail_mode: open\n", r"got a key stands twice \(line 3\)"),
        ("name: [a: b, c: d]\nladder: {a: 1, a: 2}\n", r"twice \(line 2\)"),
        ("a: " + "[" * 2000, "is nested too deeply"),
    ],
)
def test_what_is_no_mapping_of_settings_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load_policy(written(tmp_path / "p.yaml", text))


@pytest.mark.parametrize("name", ["2020-10-04", "2020-13-45"])
def test_a_name_may_look_like_a_date(tmp_path: Path, name: str) -> None:
    assert load_policy(written(tmp_path / "p.yaml", f"name: {name}\n")).name == name


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9\n")
    with pytest.raises(UserError, match=r"latin.yaml is not YAML"):
        load_policy(tmp_path / "latin.yaml")


def test_every_field_changes_the_hash() -> None:
    # `mode` has one value in this version; it is in the hash all the same.
    assert OTHER.keys() == Policy.model_fields.keys() - {"mode"}
    hashes = {Policy().hash, *(Policy(**{key: value}).hash for key, value in OTHER.items())}
    assert len(hashes) == len(OTHER) + 1
    assert Policy().model_copy(update={"mode": "substitute"}).hash not in hashes


def test_the_hash_is_a_function_of_the_settings() -> None:
    assert Policy(**OTHER).hash == Policy(**dict(reversed(OTHER.items()))).hash
    assert len(Policy().hash) == 12
    assert set(Policy().hash) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("score", "unreadable", "settings", "cue"),
    [
        (0.5, False, {}, True), (0.49, False, {}, False), (0.49, True, {}, True),
        (0.49, True, {"unreadable": "flag"}, False), (0.5, True, {"unreadable": "flag"}, True),
        (None, False, {}, True), (None, False, {"fail_mode": "open"}, False), (None, True, {"fail_mode": "open"}, True),
        (None, True, {"fail_mode": "open", "unreadable": "flag"}, False),
    ],
)  # fmt: skip
def test_what_is_a_cue(score: float | None, unreadable: bool, settings: dict[str, Any], cue: bool) -> None:
    # The policy's own threshold is not read: a sweep asks about others, and the detector's may be in force.
    policy = Policy(threshold=0.1, **settings)
    assert policy.is_cue(score, threshold=0.5, unreadable=unreadable) is cue
