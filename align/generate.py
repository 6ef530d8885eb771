"""Batch generation with vLLM as a file-to-file stage: jobs in, results appended, resumable.

The engine runs in a process of its own, so that its memory and thread settings end with it. A result is written as
soon as its chunk is done; a second run with the same files only generates what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from guard.errors import UserError

#: Jobs handed to the engine at once: enough to fill its batch, few enough that a kill loses little.
CHUNK = 96


class Job(BaseModel):
    """One continuation to sample at the paper's temperature (section 7).

    Top-k stands in for the paper's top-p 0.95: top-p sorts the whole vocabulary, which on a CPU halves the throughput
    (176 against 318 tokens/s at batch 48 on the demo model).
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt_ids: list[int]
    max_tokens: int = 160
    temperature: float = 0.6
    top_k: int = 20
    guard: bool = False


class Result(BaseModel):
    """What the engine sampled."""

    model_config = ConfigDict(extra="forbid")

    id: str
    output_ids: list[int]
    finish: str | None


class EngineSpec(BaseModel):
    """Which engine generates: model directory or hub name, guard settings (None: no guard is loaded), seed."""

    model_config = ConfigDict(extra="forbid")

    model: str
    guard: dict[str, Any] | None = None
    seed: int = 0
    max_model_len: int = 1024
    max_num_seqs: int = 96


def generate(spec: EngineSpec, jobs: Sequence[Job], out: Path, what: str) -> dict[str, Result]:
    """Results of all jobs by id, generating only those that `out` does not hold yet. Shows progress named `what`."""
    done = read_results(out)
    missing = [job for job in jobs if job.id not in done]
    if missing:
        out.parent.mkdir(parents=True, exist_ok=True)
        jobs_file = out.with_suffix(".jobs.jsonl")
        jobs_file.write_text("".join(job.model_dump_json() + "\n" for job in missing), encoding="utf-8")
        _run_worker(spec, jobs_file, out, what)
        jobs_file.unlink()
        done = read_results(out)
    return {job.id: done[job.id] for job in jobs}


def read_results(path: Path) -> dict[str, Result]:
    """Results by id; a torn last line (the writer was killed) is ignored."""
    if not path.exists():
        return {}
    found: dict[str, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            result = Result.model_validate_json(line)
        except ValueError:
            continue
        found[result.id] = result
    return found


def _run_worker(spec: EngineSpec, jobs_file: Path, out: Path, what: str) -> None:
    log = out.with_suffix(".engine.log")
    command = [sys.executable, "-m", "align.generate", spec.model_dump_json(), str(jobs_file), str(out), what]
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": "ignore",
    }
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    with log.open("ab") as sink:
        code = subprocess.run(command, env=env, stdout=sink, check=False).returncode
    if code != 0:
        raise UserError(
            f"Generation ({what}) ended with exit code {code}", fix=f"See {log}; run the same command again to go on"
        )


def _worker(spec: EngineSpec, jobs_file: Path, out: Path, what: str) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    jobs = [Job.model_validate_json(line) for line in jobs_file.read_text(encoding="utf-8").splitlines()]
    with console.status(f"{what}: starting vLLM"):
        llm = _engine(spec)
    _end_torn_line(out)
    with Progress(console=console) as bar, out.open("a", encoding="utf-8") as sink:
        task = bar.add_task(what, total=len(jobs))
        for chunk in _chunks(jobs):
            for result in _sample(llm, chunk, guarded=spec.guard is not None):
                sink.write(result.model_dump_json() + "\n")
            sink.flush()
            bar.advance(task, len(chunk))
    if spec.guard is not None:
        # The last requests' traces are written when their rows leave the batch: one more step clears it.
        _sample(llm, [Job(id="flush", prompt_ids=jobs[-1].prompt_ids, max_tokens=1)], guarded=True)


def _end_torn_line(path: Path) -> None:
    """A killed writer leaves half a line; what is appended next must not be glued to it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as sink:
            sink.write(b"\n")


def _engine(spec: EngineSpec) -> Any:
    from vllm import LLM

    from guard.engine.hardware import fast_dtype
    from guard.engine.v1 import engine_arguments

    guard = engine_arguments({**spec.guard, "allow_off": True}) if spec.guard is not None else {}
    return LLM(
        spec.model, dtype=fast_dtype(), enforce_eager=True, max_model_len=spec.max_model_len, seed=spec.seed,
        max_num_seqs=spec.max_num_seqs, block_size=32, enable_prefix_caching=True, disable_log_stats=True,
        use_tqdm_on_load=False, **guard,
    )  # fmt: skip


def _sample(llm: Any, jobs: Sequence[Job], *, guarded: bool) -> list[Result]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=job.temperature, top_k=job.top_k, max_tokens=job.max_tokens,
            extra_args={"guard_id": job.id, "guard_off": not job.guard} if guarded else None,
        )
        for job in jobs
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": job.prompt_ids} for job in jobs], params, use_tqdm=False)
    return [
        Result(id=job.id, output_ids=list(o.outputs[0].token_ids), finish=o.outputs[0].finish_reason)
        for job, o in zip(jobs, outputs, strict=True)
    ]


def _chunks(jobs: Sequence[Job]) -> Iterable[Sequence[Job]]:
    for start in range(0, len(jobs), CHUNK):
        yield jobs[start : start + CHUNK]


if __name__ == "__main__":
    _worker(EngineSpec.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
