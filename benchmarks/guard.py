"""What the guard costs inside vLLM: throughput on the demo's base model, host time in fast engine steps and alone.

python -m benchmarks.guard --out runs/bench/guard.json

All in one process. Every ratio pairs two runs of one turn, a few seconds apart, and the order of the arms is reversed
from turn to turn, so that what else the machine does falls on both. The arms: `none` (an engine without the guard),
`off` (the guard loaded, its rows switched off), `first_tier` (each step judged by the first tier, the encoder never
asked) and `full`. Speeds leave out the first engine step, which computes the prompts. About 7 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from classifiers.corpus import part_of
from classifiers.detector import Detector
from classifiers.labels import read_authored
from guard.engine.hardware import encoder_workers, fast_dtype

if TYPE_CHECKING:
    from benchmarks.guard_rig import Engine, Run

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip
#: No score reaches 1, and what cannot be read is only counted: everything is watched, nothing is forced.
POLICY = "name: benchmark\nthreshold: 1.0\nunreadable: flag\nzones: [reasoning, answer]\n"
MAX_PROMPT, STRESS_ROWS, ADAPTER_ROWS = 60, 32, 64
#: Each ratio by its name in the results: the arm whose speed is divided by the other's.
RATIOS = {
    "throughput_ratio": ("first_tier", "off"), "throughput_ratio_no_processor": ("first_tier", "none"),
    "throughput_ratio_full": ("full", "off"), "throughput_ratio_full_no_processor": ("full", "none"),
}  # fmt: skip
#: Percentiles that are told of ratios, and of the host time of an engine step.
SPREAD, HOST = {"min": 0, "q1": 25, "median": 50, "q3": 75, "max": 100}, {"p50": 50, "p95": 95}


@dataclass(frozen=True)
class Plan:
    """How much is run: `seconds` (per batch size) bound the repeats, of which there are two at least."""

    tokens: int = 48
    seconds: dict[int, float] = field(default_factory=lambda: {1: 60.0, 8: 90.0, 32: 165.0})
    stress_tokens: int = 256
    stress_seconds: float = 45.0
    adapter_tokens: int = 2000
    adapter_runs: int = 5


QUICK = Plan(tokens=16, seconds=dict.fromkeys((1, 8, 32), 0.0), stress_seconds=0.0, adapter_runs=1)


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    model: Path
    prompts: list[list[int]]
    """Authored requests in the chat template, up to the open `<think>`."""
    stream: list[int]
    """Authored reasoning, one trace after the other."""
    detectors: Mapping[str, Detector]
    scratch: Path
    bar: Progress
    plan: Plan

    def settings(self, part: str) -> dict[str, Any]:
        """The guard's settings; its traces go to `scratch / part`."""
        policy = self.scratch / "policy.yaml"
        policy.write_text(POLICY, encoding="utf-8")
        return {"policy": str(policy), "spool": str(self.scratch / part), "allow_off": True}

    def starts(self, rows: int, shift: int = 0) -> list[int]:
        """Where in the stream each row begins: far from the others."""
        return [(row * len(self.stream) // rows + shift) % len(self.stream) for row in range(rows)]


class Adapter(Protocol):
    """An engine's adapter of the guard, driven without the engine."""

    def start(self, prompts: Sequence[list[int]]) -> None:
        """Adds one row a prompt."""

    def append(self, tokens: Sequence[int]) -> None:
        """Notes one new token a row where the engine keeps them, as it does with or without a guard."""

    def step(self) -> None:
        """Makes all calls of one engine step: what is timed."""

    def stop(self) -> None:
        """Removes the rows."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/guard.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats: for trying, not for reporting.")] = False,
) -> None:
    """Measure the guard's cost in vLLM and compare it with the goals."""
    from demo.model import base_model

    os.environ.update(ENVIRONMENT)
    # It would overrule the cache size that the engines are given.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "quick": quick}
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True)) as bar:
        bench = prepare(base_model(), Path(scratch), bar, QUICK if quick else Plan())
        found["versions"]["detector"] = bench.detectors["full"].version
        # The cheap parts first: what is broken shows at once.
        found["adapter_us"], found["stress"] = _adapter(bench), _stress(bench)
        found |= _throughput(bench)
    found["goals"] = _goals(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _show(found, Console())


def prepare(model: Path, scratch: Path, bar: Progress, plan: Plan) -> Bench:
    """What is said and asked, in the tokens of a model, and the detectors that watch it."""
    from transformers import AutoTokenizer

    from benchmarks.guard_rig import FirstTier

    tokenizer = AutoTokenizer.from_pretrained(model)
    traces = [trace for trace in read_authored() if trace.language == "en"]
    asked = dict.fromkeys(trace.request for trace in traces if part_of(trace) == "test")
    chats = ([{"role": "user", "content": request}] for request in asked)
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    stream = [t for each in traces for t in tokenizer.encode(" ".join(each.steps) + "\n\n", add_special_tokens=False)]
    detectors = {"first_tier": FirstTier.load(), "full": Detector.load(workers=encoder_workers())}
    return Bench(model, [p for p in prompts if len(p) <= MAX_PROMPT], stream, detectors, scratch, bar, plan)


def _adapter(bench: Bench) -> dict[str, Any]:
    """Both adapters without an engine, by themselves and with the first tier scoring each step that ends."""
    from benchmarks.guard_adapters import NoDetector, V1Adapter, V2Adapter, engine_config

    rows, tokens = ADAPTER_ROWS, bench.plan.adapter_tokens
    found: dict[str, Any] = {"batch": rows, "tokens": tokens}
    for kind, make in (("v1", V1Adapter), ("v2", V2Adapter)):
        for name, detector in (("", NoDetector.load()), ("_first_tier", bench.detectors["first_tier"])):
            part = f"adapter-{kind}{name}"
            adapter = make(engine_config(bench.model, bench.settings(part)), detector, rows, tokens)
            found[f"{kind}{name}"] = drive_all(bench, adapter, part)
    return found


def drive_all(bench: Bench, adapter: Adapter, part: str) -> dict[str, Any]:
    """Microseconds of an engine step; `growth` is a late step's cost over an early one's, by quarters."""
    from benchmarks.guard_rig import check_receipts

    plan, prompts, twice = bench.plan, bench.prompts[:ADAPTER_ROWS], bench.stream * 2
    streams = [twice[start : start + plan.adapter_tokens] for start in bench.starts(ADAPTER_ROWS)]
    turns = bench.bar.track(range(plan.adapter_runs), description=f"{part}, batch {ADAPTER_ROWS}")
    runs = [drive(adapter, prompts, streams) for _ in turns]
    quarter = plan.adapter_tokens // 4
    growth = _summary((float(np.median(r[-quarter:]) / np.median(r[:quarter])) for r in runs), SPREAD)
    host = _summary((1e6 * t for times in runs for t in times), HOST)
    watched = check_receipts(bench.scratch / part, ADAPTER_ROWS * len(runs))
    return {**host, "growth": growth, "watched": watched}


def drive(adapter: Adapter, prompts: Sequence[list[int]], streams: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each engine step in which every row says the next token of its stream."""
    times = []
    adapter.start(prompts)
    for tokens in zip(*streams, strict=True):
        adapter.append(tokens)
        start = time.perf_counter()
        adapter.step()
        times.append(time.perf_counter() - start)
    adapter.stop()
    return times


def _stress(bench: Bench) -> dict[str, Any]:
    """A model whose forward pass is nearly free says authored reasoning, other passages in every turn."""
    from benchmarks.guard_rig import Engine, ScriptedText, build_fast_model, check_receipts

    ScriptedText.text = bench.stream
    fast = build_fast_model(bench.model, bench.scratch / "fast")
    engine = Engine(fast, bench.settings("stress"), bench.detectors, script=ScriptedText)
    engines, plan = dict.fromkeys(("off", *bench.detectors), engine), bench.plan
    found = compare(bench, "Fast steps", engines, STRESS_ROWS, plan.stress_tokens, plan.stress_seconds)
    ratios = {"ratio": found["spread"]["throughput_ratio"], "ratio_full": found["spread"]["throughput_ratio_full"]}
    medians = {name: spread["median"] for name, spread in ratios.items()}
    watched = check_receipts(bench.scratch / "stress", engine.watched)
    return {"batch": STRESS_ROWS, **medians, **found, "spread": ratios, "watched": watched}


def _throughput(bench: Bench) -> dict[str, Any]:
    """The base model in its own words; `none` runs in a second engine."""
    from benchmarks.guard_rig import Engine, check_receipts

    guarded = Engine(bench.model, bench.settings("throughput"), bench.detectors)
    plain = Engine(bench.model, None, bench.detectors)
    engines = {"none": plain, **dict.fromkeys(("off", *bench.detectors), guarded)}
    found = {
        str(rows): compare(bench, "SmolLM2-135M", engines, rows, bench.plan.tokens, seconds)
        for rows, seconds in bench.plan.seconds.items()
    }
    spreads = {rows: each.pop("spread") for rows, each in found.items()}
    spread = {name: {rows: each[name] for rows, each in spreads.items()} for name in RATIOS}
    medians = {name: {rows: each["median"] for rows, each in by_rows.items()} for name, by_rows in spread.items()}
    watched = check_receipts(bench.scratch / "throughput", guarded.watched)
    return {**medians, "spread": spread, "throughput": {**found, "watched": watched}}


def compare(
    bench: Bench, model: str, engines: Mapping[str, Engine], rows: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Runs the arms, each on its engine, forth and back again, as often as there is time for."""
    task = bench.bar.add_task(f"{model}, batch {rows}", total=seconds or None)
    # The same prompts in every turn: the prefix cache keeps the first step short.
    prompts = bench.prompts[:rows]

    def run(arm: str, turn: int, limit: int) -> Run:
        watch = arm if arm in bench.detectors else None
        return engines[arm].run(prompts, limit, watch, bench.starts(rows, turn * tokens))

    for arm in engines:
        run(arm, 0, 4)
    runs: dict[str, list[Run]] = {arm: [] for arm in engines}
    begin, turn = time.perf_counter(), 0
    while turn < 2 or turn % 2 or (time.perf_counter() - begin) * (turn + 2) / turn <= seconds:
        for arm in list(engines)[:: -1 if turn % 2 else 1]:
            runs[arm].append(run(arm, turn, tokens))
            bench.bar.update(task, completed=time.perf_counter() - begin)
        turn += 1
    bench.bar.update(task, total=1.0, completed=1.0)
    speeds = {arm: np.array([r.speed for r in each]) for arm, each in runs.items()}
    known = ((name, arm, other) for name, (arm, other) in RATIOS.items() if {arm, other} <= set(runs))
    spread = {name: _summary(speeds[arm] / speeds[other], SPREAD) for name, arm, other in known}
    return {"tokens": tokens, "spread": spread, **_details(runs)}


def _details(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Speeds and the guard's own clock by arm. `host_ratio`, the share of time spent outside the guard, does not see
    what the guard does to caches, and has none of the noise of a comparison of two runs."""
    found: dict[str, Any] = {
        "tokens_per_s": {name: _median(r.speed for r in each) for name, each in runs.items()},
        "first_step_ms": {name: _median(1e3 * r.first for r in each) for name, each in runs.items()},
    }
    for name, each in ((name, each) for name, each in runs.items() if each[0].guard_steps):
        found.setdefault("host_us_per_step", {})[name] = _summary((1e6 * t for r in each for t in r.guard_steps), HOST)
        found.setdefault("host_ratio", {})[name] = _median(1 - sum(r.guard_steps) / r.rest for r in each)
        found.setdefault("host_us_per_request", {})[name] = {
            "open": _median(1e6 * r.guard_open / r.rows for r in each),
            "close": _median(1e6 * r.guard_close / r.rows for r in each),
        }
    return found


def _summary(values: Iterable[float], percents: Mapping[str, float]) -> dict[str, float]:
    kept = list(values)
    found = zip(("mean", *percents), (np.mean(kept), *np.percentile(kept, list(percents.values()))), strict=True)
    return {"n": len(kept), **{name: round(float(value), 4) for name, value in found}}


def _median(values: Iterable[float]) -> float:
    return round(float(np.median(list(values))), 4)


def machine() -> dict[str, Any]:
    """Processor, cores, the number format that is fast on it, and what else it was doing."""
    known = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", known.read_text("utf-8") if known.exists() else "", re.MULTILINE)
    cpu, load = (names or [platform.processor()])[0], round(os.getloadavg()[0], 2)
    return {"cpu": cpu, "cores": os.cpu_count(), "dtype": fast_dtype(), "load_at_start": load}


def versions() -> dict[str, str]:
    """Of what the measurement rests on."""
    names = {"vllm", "vllm-cpu", "torch", "transformers", "onnxruntime", "numpy"}
    return {"python": platform.python_version()} | {d.name: d.version for d in distributions() if d.name in names}


def _goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    floors = [(f"throughput_ratio, batch {rows}", 0.99, got) for rows, got in found["throughput_ratio"].items()]
    floors.append((f"stress, batch {STRESS_ROWS}", 0.93, found["stress"]["ratio"]))
    goals = [{"name": n, "wanted": f">= {least}", "got": got, "met": got >= least} for n, least, got in floors]
    for name in ("v1", "v2"):
        p50 = found["adapter_us"][name]["p50"]
        label = f"adapter_us {name} p50, batch {ADAPTER_ROWS}, scoring apart"
        goals.append({"name": label, "wanted": "<= 100", "got": p50, "met": p50 <= 100})
    return goals


def _show(found: Mapping[str, Any], console: Console) -> None:
    ratios = Table("ratio of speeds", "batch", "median", "quartiles", "n", title="The guard's cost in vLLM")
    spreads = {**found["spread"], **{f"stress {k}": {STRESS_ROWS: v} for k, v in found["stress"]["spread"].items()}}
    for name, by_rows in spreads.items():
        for rows, s in by_rows.items():
            ratios.add_row(name, str(rows), f"{s['median']:.3f}", f"{s['q1']:.3f} to {s['q3']:.3f}", str(s["n"]))
    console.print(ratios)
    goals = Table("goal", "wanted", "got", "met", caption=f"load at start: {found['machine']['load_at_start']}")
    for goal in found["goals"]:
        goals.add_row(goal["name"], goal["wanted"], f"{goal['got']:.4g}", "yes" if goal["met"] else "[red]no[/red]")
    console.print(goals)


if __name__ == "__main__":
    typer.run(main)
