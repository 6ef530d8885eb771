"""A trained table of weights becomes model.onnx and manifest.json, once the graph agrees with the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from classifiers.artifact import MANIFEST_FILE, MODEL_FILE, Artifact, Kind, Manifest
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
    payload: bytes,
    probe: Probe,
    *,
    features: FeatureConfig,
    threshold: float,
    training_data: str,
    training: dict[str, str | int | float],
    metrics: dict[str, Rate],
) -> Manifest:
    """Write the artifact to directory `out` and return its manifest.

    The files are written aside first, loaded by the runtime and compared with the trained model on `probe`; only then
    do they take their place. UserError when they differ by more than 1e-4: nothing is written then.
    """
    digest = hashlib.sha256(payload).hexdigest()
    manifest = Manifest(
        kind=kind,
        version=f"{kind}-{digest[:12]}",
        sha256=digest,
        features=features,
        threshold=threshold,
        training_data=training_data,
        training=training,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=metrics,
    )
    _install(out, payload, manifest, probe)
    return manifest


def _install(out: Path, payload: bytes, manifest: Manifest, probe: Probe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    staged = out / ".staged"
    staged.mkdir(exist_ok=True)
    try:
        (staged / MODEL_FILE).write_bytes(payload)
        (staged / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        check_parity(Artifact.load(staged, manifest.kind).run, probe)
        for name in (MODEL_FILE, MANIFEST_FILE):
            os.replace(staged / name, out / name)
    finally:
        for name in (MODEL_FILE, MANIFEST_FILE):
            (staged / name).unlink(missing_ok=True)
        staged.rmdir()


def check_parity(run: Callable[..., npt.NDArray[np.float32]], probe: Probe) -> float:
    """Return the largest difference between the exported and the trained model; UserError above 1e-4."""
    ids, weights, wanted = probe
    got = run(ids) if weights is None else run(ids, weights)
    worst = float(np.max(np.abs(got.astype(np.float64) - wanted)))
    if not worst <= TOLERANCE:
        raise UserError(
            "the exported model does not agree with the trained one; nothing was written",
            got=f"a difference of {worst:.2g}",
            wanted=f"at most {TOLERANCE:g}",
            fix="Report this as a bug with the training data",
        )
    return worst
