"""The fine-tuned network becomes ONNX: the encoder with int8 weights, the heads in float32."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from classifiers.network import Heads, StepNetwork

OPSET = 17


class _Single(nn.Module):
    """The encoder on one text without padding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)  # type: ignore[no-any-return]


def export_encoder(network: StepNetwork) -> bytes:
    """Return an ONNX model in float32: ids int64 [1, k] -> vector [1, width], the mean over the tokens."""
    ids = torch.tensor([[101, 2023, 102]])
    return _export(_Single(network.encoder), (ids,), ["ids"], ["vector"], {"ids": {1: "k"}})


def export_heads(heads: Heads) -> bytes:
    """Return an ONNX model: step, previous, request float32 [n, width] -> scores [n, 2] (cue, risk)."""
    width = heads.risk.in_features
    rows = {name: {0: "n"} for name in ("step", "previous", "request", "scores")}
    example = tuple(torch.zeros(1, width) for _ in range(3))
    return _export(heads, example, ["step", "previous", "request"], ["scores"], rows)


def read_heads(payload: bytes) -> Heads:
    """Return the heads that `export_heads` wrote, uncalibrated, to go on training from."""
    import onnx
    from onnx import numpy_helper

    held = {each.name: each for each in onnx.load_from_string(payload).graph.initializer}
    names = [name for name, _ in Heads(1).named_parameters()]
    weights = {name: torch.tensor(numpy_helper.to_array(held[name]).copy()) for name in names}
    heads = Heads(weights["risk.weight"].shape[1])
    heads.load_state_dict(weights, strict=False)
    return heads.eval()


def quantise(payload: bytes) -> bytes:
    """Return the model with int8 weights, activations quantised as they come (onnxruntime's dynamic quantisation).

    Weights are scaled per channel and use 7 bits, because sums of 8-bit products overflow on CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, clean, target = (Path(folder) / name for name in ("float.onnx", "clean.onnx", "int8.onnx"))
        source.write_bytes(payload)
        with _quiet_root_logger():
            quant_pre_process(source, clean, skip_symbolic_shape=True)
            quantize_dynamic(clean, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        return target.read_bytes()


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """onnxruntime's quantisation warns about each step it skips, as the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
) -> bytes:
    buffer = io.BytesIO()
    module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, example, buffer,  # type: ignore[arg-type]  # the older exporter writes to a buffer too
            input_names=inputs, output_names=outputs, dynamic_axes=axes,
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return buffer.getvalue()
