"""The hash that tells weights apart, and a registry whose every damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.errors import UserError
from guard.weights import LoadedWeights, Manifest, Registry, file_hash, known_weights, unlike, weights_hash


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory shaped like a model: 80 MB, so that it is hashed by samples."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(80 << 20))
    return path


def test_the_hash_sees_a_trained_matrix_and_not_the_place(model: Path, tmp_path: Path) -> None:
    before = weights_hash(str(model))
    assert len(before) == 12
    assert weights_hash(str(shutil.copytree(model, tmp_path / "elsewhere"))) == before
    with (model / "model.safetensors").open("r+b") as weights:
        weights.seek(20 << 20)
        weights.write(b"\1" * (1 << 20))
    changed = weights_hash(str(model))
    assert changed != before
    (model / "config.json").write_text('{"a": 1}')
    assert weights_hash(str(model)) not in (before, changed)


def test_the_hash_of_a_small_file_sees_every_byte(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    before = weights_hash(str(model))
    weights.write_bytes(bytes(700_000) + b"\1" + bytes((1 << 20) - 700_001))
    assert weights_hash(str(model)) != before


def test_a_hub_name_has_no_hash(model: Path) -> None:
    assert weights_hash("org/name") == ""
    with pytest.raises(UserError, match="--versions needs a model directory"):
        known_weights("org/name", "--versions")
    assert known_weights(str(model), "x") == weights_hash(str(model))


def test_a_hub_model_is_hashed_where_the_local_cache_holds_all_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = shutil.copytree(model, repo / "snapshots" / "c0ffee")
    assert weights_hash("org/name") == weights_hash(str(model))
    assert LoadedWeights(lambda: "org/name").now() == ("org/name", weights_hash(str(model)))
    # Another copy of the weights that nobody loads.
    (snapshot / "consolidated.safetensors").write_bytes(b"1")
    (snapshot / "pytorch_model.bin").write_bytes(b"2")
    assert weights_hash("org/name") == weights_hash(str(model))
    shards = {"a": "model-00001-of-2.safetensors", "b": "model-00002-of-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (snapshot / "pytorch_model.bin").unlink()
    (snapshot / shards["a"]).write_bytes(b"first")
    assert weights_hash("org/name") == "", "half of it is there"
    (snapshot / shards["b"]).write_bytes(b"second")
    assert len(weights_hash("org/name")) == 12
    assert weights_hash("org/name") != weights_hash(str(model))
    assert [weights_hash(name) for name in ("org/other", "no/hub/name", "/no/directory")] == [""] * 3


def test_loaded_weights_follow_the_path_and_survive_a_missing_file(model: Path, tmp_path: Path) -> None:
    where = [str(model)]
    loaded = LoadedWeights(lambda: where[0])
    assert loaded.now() == (str(model), weights_hash(str(model)))
    (tmp_path / "empty").mkdir()
    where[0] = str(tmp_path / "empty")
    assert loaded.now() == (where[0], "")


def version(root: Path, number: int, base: str = "base") -> Path:
    """A version with one file beside its manifest."""
    path = root / str(number)
    (path / "model").mkdir(parents=True)
    (path / "model" / "config.json").write_text("{}")
    files = {"model/config.json": file_hash(path / "model" / "config.json")}
    manifest = Manifest(version=number, created=1.0, base=base, base_name="m", weights="w", files=files)
    (path / "manifest.json").write_text(manifest.model_dump_json())
    return path


def test_an_empty_registry_serves_the_model_as_it_came(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "none")
    assert (registry.current(), registry.versions()) == (0, [])
    with pytest.raises(UserError, match=r"Version 1 does not exist .* one of: none"):
        registry.manifest(1)


def test_versions_are_numbers_in_order_and_scratch_is_none(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        version(tmp_path, number)
    version(tmp_path, 3).rename(tmp_path / ".3.part")
    registry = Registry(tmp_path)
    assert registry.versions() == [1, 2, 10]
    config = tmp_path / "10" / "model" / "config.json"
    assert registry.verify(10, "base").files == {"model/config.json": file_hash(config)}
    (tmp_path / "current").write_text("10\n")
    assert registry.current() == 10


def test_every_damage_is_named(tmp_path: Path) -> None:
    registry, path = Registry(tmp_path), version(tmp_path, 1)
    with pytest.raises(UserError, match=r"trained from another model; got other; wanted base \(m\)"):
        registry.verify(1, "other")
    (path / "model" / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"is not what was promoted; got model/config\.json"):
        registry.verify(1, "base")
    (path / "model" / "config.json").write_text("{}")
    registry.verify(1, "base")
    (path / "model" / "extra").write_text("")
    with pytest.raises(UserError, match="got model/extra"):
        registry.verify(1, "base")
    (path / "model" / "extra").unlink()
    (path / "model" / "config.json").unlink()
    with pytest.raises(UserError, match=r"got model/config\.json"):
        registry.verify(1, "base")
    (path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        registry.verify(1, "base")
    (tmp_path / "current").write_text("-1")
    with pytest.raises(UserError, match="current is damaged; got -1; wanted the number of a version"):
        registry.current()


def test_tensors_that_cannot_take_the_place_of_others_are_named(tmp_path: Path) -> None:
    def model(name: str, config: str = "{}", **shapes: tuple[int, ...]) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(config)
        save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, path / "model.safetensors")
        return path

    base = model("base", a=(2, 3), b=(4,))
    assert unlike(model("same", a=(2, 3), b=(4,)), base) == []
    assert unlike(model("other", a=(3, 2), c=(4,)), base) == ["a", "b", "c"]
    tied = '{"tie_word_embeddings": true}'
    assert unlike(model("tied", tied, a=(2, 3), b=(4,), **{"lm_head.weight": (2,)}), base) == []
    assert unlike(model("untied", a=(2, 3), b=(4,), **{"lm_head.weight": (2,)}), base) == ["lm_head.weight"]
