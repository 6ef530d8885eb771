"""A trained model becomes an artifact, once what the runtime loads agrees with what was trained."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from classifiers.artifact import MANIFEST_FILE, Kind, Manifest, version_of
from classifiers.features import FeatureConfig
from classifiers.stats import Rate
from guard.errors import UserError

TOLERANCE = 1e-4
GRID = 2.0**-17
"""Weights are multiples of it. Sums below 64 are then exact in float32, so neither the order of adding nor the batch
a step is scored in can change a score."""
OPSET = 17
IR_VERSION = 8

Floats = npt.NDArray[np.floating]
Probe = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]] | None, npt.NDArray[np.floating]]
"""Rows of ids, their weights if the graph takes weights, and the trained model's probabilities [n, heads]."""


def snap(weights: Floats) -> npt.NDArray[np.float32]:
    """Round weights to the grid; do it before anything is measured, so that the exported model is the trained one."""
    return (np.round(np.asarray(weights, np.float64) / GRID) * GRID).astype(np.float32)


def build_graph(table: Floats, bias: Floats, *, weighted: bool) -> bytes:
    """Return an ONNX model: ids int64 [n, k] -> scores float32 [n, heads] = sigmoid(sum of table[ids] + bias).

    `table` is [ids, heads] and its row 0, padding, must be zero. `weighted` adds an input `weights` float32 [n, k]
    that every looked-up row is multiplied with.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    if np.any(table[0]):
        raise ValueError("row 0 of the table is padding and must be zero")
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "k"])]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0)]
    constants: dict[str, npt.NDArray[Any]] = {
        "table": table.astype(np.float32),
        "bias": bias.astype(np.float32),
        "axis": np.array([1], np.int64),
    }
    if weighted:
        inputs.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["n", "k"]))
        constants["last"] = np.array([2], np.int64)
        nodes.append(helper.make_node("Unsqueeze", ["weights", "last"], ["column"]))
        nodes.append(helper.make_node("Mul", ["rows", "column"], ["scaled"]))
    nodes += [
        helper.make_node("ReduceSum", ["scaled" if weighted else "rows", "axis"], ["sums"], keepdims=0),
        helper.make_node("Add", ["sums", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", table.shape[1]])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "hashed_linear", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="reasonguard")
    model.ir_version = IR_VERSION
    checker.check_model(model)
    payload: bytes = model.SerializeToString()
    return payload


def write_artifact(
    out: Path,
    kind: Kind,
    files: dict[str, bytes],
    check: Callable[[Path], object],
    *,
    features: FeatureConfig,
    threshold: float,
    training_data: str,
    training: dict[str, str | int | float],
    metrics: Callable[[Path], dict[str, Rate]],
    clearing: Sequence[tuple[float, float]] = (),
) -> Manifest:
    """Write the artifact to directory `out` and return its manifest.

    The files are written aside first and given to `check`, which loads them with the runtime and raises when they are
    not the trained model, and to `metrics`; only then do they take their place.
    """
    digests = {name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()}
    manifest = Manifest(
        kind=kind,
        version=version_of(kind, digests),
        files=digests,
        features=features,
        threshold=threshold,
        clear_below=tuple(below for below, _ in clearing),
        cleared_score=tuple(score for _, score in clearing),
        training_data=training_data,
        training=training,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics={},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, payload in files.items():
            (staged / name).write_bytes(payload)
        _write_manifest(staged, manifest)
        check(staged)
        manifest = manifest.model_copy(update={"metrics": metrics(staged)})
        _write_manifest(staged, manifest)
        install(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return manifest


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def install(artifact: Path, out: Path) -> None:
    """Put an artifact's files in place of those in directory `out`, the manifest last."""
    out.mkdir(parents=True, exist_ok=True)
    old = _files_of(out)
    names = sorted(path.name for path in artifact.iterdir() if path.name != MANIFEST_FILE)
    for name in [*names, MANIFEST_FILE]:
        os.replace(artifact / name, out / name)
    for name in old - set(names):
        (out / name).unlink(missing_ok=True)


def _files_of(directory: Path) -> set[str]:
    """The files that the manifest in `directory` names; none where there is no readable manifest."""
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return set()
    return {name for name in manifest.files if Path(name).name == name}


def check_parity(run: Callable[..., npt.NDArray[np.float32]], probe: Probe) -> float:
    """Return the largest difference between the exported and the trained model; UserError above 1e-4."""
    ids, weights, wanted = probe
    got = run(ids) if weights is None else run(ids, weights)
    return compare_scores(got, wanted, TOLERANCE)


def compare_scores(got: Floats, wanted: Floats, tolerance: float) -> float:
    """Return the largest difference of two arrays of scores; UserError when it is above `tolerance`."""
    worst = float(np.max(np.abs(got.astype(np.float64) - wanted), initial=0.0))
    if not worst <= tolerance:
        raise UserError(
            "the exported model does not agree with the trained one; nothing was written",
            got=f"a difference of {worst:.2g}",
            wanted=f"at most {tolerance:g}",
            fix="Report this as a bug with the training data",
        )
    return worst
