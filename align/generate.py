"""Batch generation with vLLM, file to file: jobs in, results appended, resumable.

The engine runs in a process of its own (`align.worker`), so that its memory and thread settings end with it. It starts
with the first job that is missing and stays for the next stage, and for the next weights of the same model: starting
one costs half a minute on a CPU, exchanging the weights of the demo model half a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from guard.errors import UserError

STOP_SECONDS = 60


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
    """Needs an engine with a guard."""
    stop_ids: list[int] = []
    """Ids that end the output beside the end of turn; they are its last id."""

    @property
    def key(self) -> str:
        """12 hex digits over everything but the id: an id may come to ask something else."""
        return hashlib.sha256(self.model_dump_json(exclude={"id"}).encode()).hexdigest()[:12]

    @property
    def guard_id(self) -> str:
        """Under which the guard logs it: the trace of an earlier job with this id is another one."""
        return f"{self.id}@{self.key}"


class Result(BaseModel):
    """What the engine sampled."""

    model_config = ConfigDict(extra="forbid")

    id: str
    job: str
    """The key of the job that it answers."""
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


class Order(BaseModel):
    """What the worker is asked for: with which weights, a file of jobs, where results go, what its bar says."""

    model_config = ConfigDict(extra="forbid")

    model: str
    jobs: Path
    out: Path
    what: str


class Generator:
    """An engine that generates for one stage after the other. A context manager: leaving it ends the engine.

    `log` takes what the engine prints.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._log = log
        self._worker: subprocess.Popen[str] | None = None
        self._ready = False

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def context(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return self.spec.max_model_len

    def start(self) -> None:
        """Starts the engine before there is anything to do, and does not wait for it."""
        self._worker = self._worker or self._spawn()

    def use(self, model: str) -> None:
        """From the next job on another model's weights answer: same architecture, same tokenizer."""
        self.spec = self.spec.model_copy(update={"model": model})

    def generate(self, jobs: Sequence[Job], out: Path, what: str) -> dict[str, Result]:
        """Results of all jobs by id, generating only those that `out` does not hold yet. Shows progress named `what`.

        A result is written as soon as it is whole. UserError when the engine dies.
        """
        done = answers(out, jobs)
        missing = [job for job in jobs if job.id not in done]
        if missing:
            out.parent.mkdir(parents=True, exist_ok=True)
            file = out.with_suffix(".jobs.jsonl")
            file.write_text("".join(job.model_dump_json() + "\n" for job in missing), encoding="utf-8")
            self._send(Order(model=self.spec.model, jobs=file.resolve(), out=out.resolve(), what=what))
            file.unlink()
            done = answers(out, jobs)
        return done

    def close(self) -> None:
        """Ends the engine and frees its memory; the next job starts a new one."""
        if self._worker is None or self._worker.stdin is None:
            return
        self._worker.stdin.close()
        try:
            self._worker.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._worker, self._ready = None, False

    def _send(self, order: Order) -> None:
        self.start()
        worker = self._worker
        if worker is None or worker.stdin is None or worker.stdout is None:
            raise RuntimeError("the worker has no pipes")
        answer = ""
        try:
            if not self._ready:
                with Console(stderr=True).status(f"{order.what}: starting vLLM"):
                    self._ready = bool(worker.stdout.readline())
            worker.stdin.write(order.model_dump_json() + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:
            # Ctrl-C: the engine must not go on alone.
            worker.kill()
            raise
        if not answer:
            self._worker, self._ready = None, False
            raise UserError(
                f"Generation ({order.what}) ended with exit code {worker.wait()}",
                fix=f"See {self._log}; run the same command again to go on",
            )

    def _spawn(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "align.worker", self.spec.model_dump_json(), str(self._log.resolve())]
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
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_results(path: Path) -> dict[str, Result]:
    """The newest results by id, whatever they answer."""
    return {result.id: result for result in _results(path)}


def answers(path: Path, jobs: Iterable[Job]) -> dict[str, Result]:
    """The results of a file that answer exactly these jobs, by id in the jobs' order; those of a job that was asked
    otherwise under the same id stay in the file and are none."""
    wanted = {(job.id, job.key): job.id for job in jobs}
    found = {(r.id, r.job): r for r in _results(path) if (r.id, r.job) in wanted}
    return {job_id: found[each] for each, job_id in wanted.items() if each in found}


def _results(path: Path) -> Iterator[Result]:
    """The whole lines; a torn one (the writer was killed) is passed over, and one from before jobs had keys."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield Result.model_validate_json(line)


def end_torn_line(path: Path) -> None:
    """A killed writer leaves half a line; what is appended next must not be glued to it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as sink:
            sink.write(b"\n")


def drop_results(path: Path, jobs: Iterable[Job]) -> None:
    """Takes the results of these jobs out of a file, so that they are generated again."""
    dropped = {(job.id, job.key) for job in jobs}
    kept = [result for result in _results(path) if (result.id, result.job) not in dropped]
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(result.model_dump_json() + "\n" for result in kept), encoding="utf-8")
    scratch.replace(path)
