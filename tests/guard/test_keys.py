"""The file of keys and its commands: what is kept, what is refused, and that no key is ever shown twice."""

from __future__ import annotations

import re
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from guard.errors import UserError
from guard.keys import Key, Keys, Quotas, change, hash_of, load_keys, new_key, policy_of
from guard.keys_cli import app
from guard.policy import Policy

HASH = hash_of("rg-a")
KEY = "rg-U2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in args])


def sentence(*args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    result = run("add", "team-a", "--keys", path, "--requests-per-minute", 60, "--shadow")
    key = result.stdout.strip()
    assert re.fullmatch(r"rg-[A-Za-z0-9_-]{43}", key)
    assert key not in result.stderr
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert yaml.safe_load(path.read_text()) == {"keys": [
        {"name": "team-a", "hash": hash_of(key), "shadow": True, "quotas": {"requests_per_minute": 60}},
    ]}  # fmt: skip
    assert load_keys(path).keys == (
        Key(name="team-a", hash=hash_of(key), shadow=True, quotas=Quotas(requests_per_minute=60)),
    )
    assert key != new_key()
    listed = run("ls", "--keys", path).stdout
    assert "team-a" in listed
    assert key not in listed
    assert hash_of(key) not in listed
    assert run("revoke", "team-a", "--keys", path).exit_code == 0
    assert load_keys(path).keys == ()
    assert [each.name for each in tmp_path.iterdir()] == ["keys.yaml"]


def test_what_cannot_be_done_is_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    run("add", "team-a", "--keys", path)
    before = path.read_bytes()
    assert sentence("add", "team-a", "--keys", path) == (
        f"{path} has a key for team-a already. Revoke it first, or take another name."
    )
    assert sentence("revoke", "team-b", "--keys", path) == (
        f"{path} has no key for team-b. `keys ls` lists what there is."
    )
    assert sentence("add", "a b", "--keys", path).startswith("Key a b, key `name`: String should match pattern")
    assert "key `quotas.concurrent`: Input should be greater than or equal to 1" in sentence(
        "add", "team-b", "--keys", path, "--concurrent", 0
    )
    missing = tmp_path / "none.yaml"
    assert sentence("add", "team-b", "--keys", path, "--policy", missing).startswith(f"Policy file {missing} cannot")
    assert sentence("revoke", "team-b", "--keys", missing) == (
        f"File of keys {missing} cannot be read; got No such file or directory."
    )
    assert path.read_bytes() == before


def test_keys_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def add(name: str) -> None:
        change(path, lambda known: Keys(keys=(*known.keys, Key(name=name, hash=hash_of(name)))))

    threads = [threading.Thread(target=add, args=(f"t{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in load_keys(path).keys} == {f"t{i}" for i in range(12)}


@pytest.mark.parametrize(("entries", "said"), [
    ([{"name": "a", "key": KEY}], "key `keys.0.hash`: Field required."),
    ([{"name": "a", "hash": KEY}], "key `keys.0.hash`: String should match pattern '^sha256:[0-9a-f]{64}$'."),
    ([{"name": "a", "hash": HASH, "key": KEY}], "key `keys.0.key`: Extra inputs are not permitted."),
    ([{"name": KEY + " ", "hash": HASH}], "key `keys.0.name`: String should match pattern"),
    ([{"name": "a", "hash": HASH, "quotas": {"concurrent": 0}}], "key `keys.0.quotas.concurrent`: Input should be"),
    ([{"name": "a", "hash": HASH, "quotas": {"per_hour": 5}}], "key `keys.0.quotas.per_hour`: Extra inputs"),
    ([{"name": "a", "hash": HASH}] * 2, "key `the file`: Value error, `a` has the name of an earlier entry."),
    ([{"name": n, "hash": HASH} for n in "ab"], "key `the file`: Value error, `b` has the hash of an earlier entry."),
    (KEY, "key `keys`: Input should be a valid tuple."),
])  # fmt: skip
def test_a_wrong_file_names_the_place_and_never_quotes_a_key(tmp_path: Path, entries: Any, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": entries}))
    with pytest.raises(UserError) as caught:
        load_keys(path)
    assert str(caught.value).startswith(f"File of keys {path}, {said}")
    assert KEY not in str(caught.value)


def test_a_file_that_is_no_yaml_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{KEY}")
    with pytest.raises(UserError, match="is not YAML") as caught:
        load_keys(path)
    assert KEY not in str(caught.value)


def test_a_policy_lies_beside_the_file_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "etc" / "strict.yaml", tmp_path / "other.yaml"
    inside.parent.mkdir()
    inside.write_text("name: strict\nthreshold: 0.25\n")
    outside.write_text("name: outside\n")
    path = inside.parent / "keys.yaml"
    monkeypatch.chdir(inside.parent)
    run("add", "near", "--keys", "keys.yaml", "--policy", "strict.yaml", "--no-shadow")
    run("add", "far", "--keys", "keys.yaml", "--policy", "../other.yaml")
    run("add", "none", "--keys", "keys.yaml", "--shadow")
    monkeypatch.chdir("/")
    near, far, none = load_keys(path).keys
    assert (near.policy, far.policy, none.policy) == (Path("strict.yaml"), outside, None)
    default = Policy(name="served", shadow=True)
    assert policy_of(path, near, default) == Policy(name="strict", threshold=0.25)
    assert policy_of(path, far, default) == Policy(name="outside")
    assert policy_of(path, none, default.model_copy(update={"shadow": False})) == default
