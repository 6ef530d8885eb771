"""lm-eval's tasks by name, where the hub is in reach: runs EleutherAI's harness in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from classifiers.stats import Rate, wilson
from guard.errors import UserError


def run_harness(model: str, tasks: Sequence[str], out: Path, seed: int = 0) -> dict[str, Rate]:
    """The first metric of each task with its interval; what `out` holds already is not run again.

    UserError when lm-eval is not installed or fails: most of its tasks fetch their data from the hub.
    """
    wanted = out / "results.json"
    if not wanted.exists():
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-eval is not installed", fix="Run `pip install lm-eval`, or leave --lm-eval out")
        out.mkdir(parents=True, exist_ok=True)
        _run(_command(model, tasks, out, seed), out / "lm-eval.log", tasks)
        newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        newest.replace(wanted)
    return read_harness(json.loads(wanted.read_text(encoding="utf-8")), tasks)


def read_harness(results: dict[str, Any], tasks: Sequence[str]) -> dict[str, Rate]:
    """Each task's first metric in lm-eval's results with Wilson's interval: its metrics are means of 0 to 1.

    lm-eval's own standard error is 0 where all cases agree, which says too much.
    """
    found = {}
    for task in tasks:
        row = results["results"].get(task, {})
        name = next((key for key in row if "," in key and "_stderr" not in key), None)
        if name is None:
            raise UserError(f"lm-eval's results hold no figure of {task}", wanted=f"one of {', '.join(tasks)}")
        cases = int(results["n-samples"][task]["effective"])
        rate, lo, hi = wilson(float(row[name]) * cases, cases)
        found[task] = Rate(rate=rate, lo=lo, hi=hi, n=cases)
    return found


def _command(model: str, tasks: Sequence[str], out: Path, seed: int) -> list[str]:
    from guard.engine.hardware import on_gpu

    engine = "vllm" if on_gpu() else "hf"
    return [
        sys.executable, "-m", "lm_eval", "run", "--model", engine, "--model_args", f"pretrained={model}",
        "--tasks", ",".join(tasks), "--output_path", str(out), "--seed", str(seed), "--apply_chat_template",
    ]  # fmt: skip


def _run(command: list[str], log: Path, tasks: Sequence[str]) -> None:
    with log.open("w", encoding="utf-8") as sink, Console(stderr=True).status(f"lm-eval: {', '.join(tasks)}"):
        code = subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError("lm-eval failed", got=lines[-1] if lines else f"exit code {code}", fix=f"See {log}")
