"""What the guard costs on a GPU, under Model Runner V2: throughput of a large model, and the adapter alone.

python -m benchmarks.guard_cuda --out runs/bench/guard-cuda.json

The model has the shape of an 8B one and random weights: what it would say is replaced by authored reasoning, so that
steps end as they do in real traces, while its whole forward pass is paid. Arms and pairing as in `benchmarks.guard`.
Needs a CUDA device and the package `vllm`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.guard import ADAPTER_ROWS, Bench, Plan, compare, drive_all, machine, prepare, versions

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
#: Llama-3.1-8B's and Qwen3-8B's size, in bf16: 16 GB.
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
KV_BYTES = 8 * 2**30


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/guard-cuda.json"),
    base: Annotated[
        Path | None, typer.Option(help="Model directory whose tokenizer is used. Default: the demo's base model.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,32,64",
    seconds: Annotated[float, typer.Option(help="How long each batch size is measured.")] = 30.0,
    graphs: Annotated[bool, typer.Option(help="Decode with CUDA graphs, as engines in service do.")] = True,
    backend: Annotated[str, typer.Option(help="vLLM's attention backend. Default: its own choice.")] = "",
) -> None:
    """Measure the guard's cost on a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise typer.BadParameter("this measures on a GPU, and torch sees none: run `python -m benchmarks.guard` here")
    os.environ.update(ENVIRONMENT)
    found: dict[str, Any] = {
        "machine": machine() | {"gpu": torch.cuda.get_device_name()}, "versions": versions(), "cuda_graphs": graphs,
        "attention": backend or "auto",
    }  # fmt: skip
    plan = Plan(
        tokens=128, seconds={int(rows): seconds for rows in batches.split(",")}, adapter_tokens=600, adapter_runs=3
    )
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True)) as bar:
        bench = prepare(base or _demo_base(), Path(scratch), bar, plan)
        found["versions"]["detector"] = bench.detectors["full"].version
        found["adapter_us"] = _adapter(bench)
        found["throughput"] = _throughput(bench, graphs, backend)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _show(found, Console())


def _demo_base() -> Path:
    from demo.model import base_model

    return base_model()


def _adapter(bench: Bench) -> dict[str, Any]:
    """V2's adapter on CUDA tensors without an engine: microseconds of an engine step, nothing else on the device."""
    from benchmarks.guard_adapters import NoDetector, V2Adapter, engine_config

    found: dict[str, Any] = {"batch": ADAPTER_ROWS, "tokens": bench.plan.adapter_tokens}
    for name, detector in (("v2", NoDetector.load()), ("v2_first_tier", bench.detectors["first_tier"])):
        config = engine_config(bench.model, bench.settings(f"adapter-{name}"))
        adapter = V2Adapter(config, detector, ADAPTER_ROWS, bench.plan.adapter_tokens, "cuda")
        found[name] = drive_all(bench, adapter, f"adapter-{name}")
    return found


def _throughput(bench: Bench, graphs: bool, backend: str) -> dict[str, Any]:
    from benchmarks.guard_cuda_rig import ScriptedText, build_large_model
    from benchmarks.guard_rig import Engine, check_receipts

    ScriptedText.text = bench.stream
    arguments: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "kv_cache_memory_bytes": KV_BYTES}
    if graphs:
        # Graphs of the decoding steps without torch.compile, which would take minutes.
        arguments |= {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    if backend:
        arguments["attention_config"] = {"backend": backend}
    model = build_large_model(bench.model, bench.scratch / "large", SHAPE)
    engine = Engine(model, bench.settings("throughput"), bench.detectors, script=ScriptedText, **arguments)
    engines = dict.fromkeys(("off", *bench.detectors), engine)
    found: dict[str, Any] = {
        str(rows): compare(bench, "8B shape", engines, rows, bench.plan.tokens, seconds)
        for rows, seconds in bench.plan.seconds.items()
    }
    return {**found, "watched": check_receipts(bench.scratch / "throughput", engine.watched)}


def _show(found: Mapping[str, Any], console: Console) -> None:
    table = Table("batch", "arm", "ratio", "quartiles", "n", "ms a step", "guard's us a step (p50)",
                  title=f"The guard's cost on a {found['machine']['gpu']}")  # fmt: skip
    for rows, each in found["throughput"].items():
        if rows == "watched":
            continue
        for name, arm in (("throughput_ratio", "first_tier"), ("throughput_ratio_full", "full")):
            spread, speed = each["spread"][name], each["tokens_per_s"][arm]
            table.add_row(
                rows, arm, f"{spread['median']:.3f}", f"{spread['q1']:.3f} to {spread['q3']:.3f}", str(spread["n"]),
                f"{1e3 * int(rows) / speed:.2f}", f"{each['host_us_per_step'][arm]['p50']:.0f}",
            )  # fmt: skip
    console.print(table)
    for name in ("v2", "v2_first_tier"):
        console.print(f"adapter alone, batch {ADAPTER_ROWS}, {name}: p50 {found['adapter_us'][name]['p50']:.0f} us")


if __name__ == "__main__":
    typer.run(main)
