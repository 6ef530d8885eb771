"""The same rollouts on a Ray cluster: traces and prompts are read as Parquet by all machines, each worker holds an
engine, a detector and a judge, and what a batch brought comes back to the driver, which keeps it.

All rows of one request meet in one batch, so that its limit of generations holds on a cluster too; which triggers a
source gets depends on the seed and the source alone, not on its batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.candidates import RolloutSettings, one_by_one
from align.generate import EngineSpec, Generator, end_torn_line
from align.model import load_runtime, load_tokenizer
from align.pairs import request_key
from align.rollouts import Harvest, roll_out
from align.sources import OTHER_TOKENIZER, OTHER_WEIGHTS, Prompt, Writers, set_aside
from align.tables import open_path
from align.tools import Tools
from classifiers.judge import Judge
from guard.errors import UserError
from guard.prompt import PromptReader
from guard.traces import Trace

if TYPE_CHECKING:
    import pyarrow as pa

    from align.pipeline import Workbench


class RayOrder(BaseModel):
    """What a cluster is asked for. Paths of model, policy and detector must hold on every machine of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str
    """`local` (a cluster on this machine, for the time of the run), `auto`, or `ray://HOST:PORT`."""
    traces: str | None
    prompts: str | None
    workers: int = Field(default=1, ge=1)
    """Engines; each takes one GPU where the cluster has any."""
    batch: int = Field(default=64, ge=1)
    """Traces and prompts of one batch, about."""


class WorkerSpec(BaseModel):
    """What each worker builds its tools from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: EngineSpec
    policy: Path | None
    detector: Path | None
    judge: Path | None
    settings: RolloutSettings
    writers: Writers
    """Whose traces are taken."""


class Batch(BaseModel):
    """One line of `harvest.jsonl`: what the traces and prompts with these ids brought."""

    model_config = ConfigDict(extra="forbid")

    ids: list[str]
    harvest: Harvest


def harvest_on_ray(bench: Workbench, order: RayOrder, settings: RolloutSettings) -> Harvest:
    """Rolls out everything that `harvest.jsonl` of the run does not hold yet; returns all that it holds then.

    UserError when Ray is missing or cannot be reached, and with the reason of a worker that gave up.
    """
    ray = _ray(order)
    path = bench.out / "harvest.jsonl"
    done = list(_batches(path))
    known = frozenset(i for batch in done for i in batch.ids)
    spec = WorkerSpec(
        writers=Writers.of(bench.settings.model),
        engine=EngineSpec(model=bench.settings.model, seed=bench.settings.seed, max_model_len=bench.context),
        policy=bench.settings.policy, detector=bench.settings.detector, judge=bench.settings.judge, settings=settings,
    )  # fmt: skip
    end_torn_line(path)
    try:
        with path.open("a", encoding="utf-8") as sink:
            for row in _dataset(ray, order, spec, known).iter_rows():
                sink.write(row["batch"] + "\n")
                sink.flush()
                done.append(Batch.model_validate_json(row["batch"]))
    except ray.exceptions.RayError as error:
        # The last line of a remote traceback is the exception itself.
        got = str(error).strip().split("\n")[-1]
        raise UserError("A Ray worker gave up", got=got, fix="Run the same command again to go on") from error
    finally:
        if order.address == "local":
            ray.shutdown()
    harvest = sum((b.harvest for b in sorted(done, key=lambda b: b.ids)), Harvest())
    strangers = harvest.dropped[f"trace: {OTHER_TOKENIZER}"] + harvest.dropped[f"trace: {OTHER_WEIGHTS}"]
    if not harvest.sources and strangers:
        raise UserError(f"None of the traces in {order.traces} comes from {bench.settings.model}")
    return harvest


def _ray(order: RayOrder) -> Any:
    # Ray reports usage to its makers unless told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise UserError("--ray needs Ray", fix='Install it: pip install "reasonguard[ray]"') from error
    try:
        if order.address == "local":
            root = str(Path(__file__).resolve().parent.parent)
            ray.init(
                include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}},
                ignore_reinit_error=True,
            )  # fmt: skip
        else:
            ray.init(address=order.address, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray cluster {order.address} cannot be reached", got=str(error).split("\n")[0]) from error
    return ray


def _dataset(ray: Any, order: RayOrder, spec: WorkerSpec, done: frozenset[str]) -> Any:
    """One row `batch` (a `Batch` as JSON) for each batch of rows that are not done."""
    inputs = [
        (kind, _read(ray, where)) for kind, where in (("trace", order.traces), ("prompt", order.prompts)) if where
    ]
    buckets = max(1, sum(data.count() for _, data in inputs) // order.batch)
    tagged = [
        data.map_batches(Tag(kind, buckets, done), batch_format="pyarrow", batch_size=1024) for kind, data in inputs
    ]
    whole = tagged[0].union(*tagged[1:])
    resources = ray.cluster_resources()
    # Reading and shuffling need CPUs as well: the workers leave them half.
    share = {"num_gpus": 1} if resources.get("GPU") else {"num_cpus": resources.get("CPU", 1.0) / order.workers / 2}
    return whole.groupby("bucket", num_partitions=min(buckets, 200)).map_groups(
        PairWorker, batch_format="pyarrow", fn_constructor_args=[spec.model_dump_json()],
        compute=ray.data.ActorPoolStrategy(size=order.workers), **share,
    )  # fmt: skip


def _read(ray: Any, where: str) -> Any:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = open_path(where)
    if not filesystem.exists(path):
        raise UserError(f"{where} does not exist", fix="`cli.py align export` writes Parquet")
    return ray.data.read_parquet(path, filesystem=PyFileSystem(FSSpecHandler(filesystem)), file_extensions=None)


class Tag:
    """Rows of any schema -> `id`, `bucket` (the same for all rows of one request), `kind`, `body` (the row as JSON)."""

    def __init__(self, kind: str, buckets: int, done: frozenset[str]) -> None:
        self._kind, self._buckets, self._done = kind, buckets, done

    def __call__(self, table: pa.Table) -> pa.Table:
        """One batch, without the rows that are done."""
        import pyarrow as pa

        rows = [row for row in map(self._row, table.to_pylist()) if row["id"] not in self._done]
        text = pa.string()
        schema = pa.schema({"id": text, "bucket": pa.int64(), "kind": text, "body": text})
        return pa.Table.from_pylist(rows, schema=schema)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(row)
        # A trace that was kept without text has its request in its prompt's ids.
        key = request_key(str(row.get("request") or "")) or json.dumps(row.get("prompt_ids"))
        known = row.get("guard_id") if self._kind == "trace" else None
        return {
            "id": str(known or f"{self._kind}-{_digest(body)[:16]}"), "kind": self._kind, "body": body,
            "bucket": int(_digest(key)[:12], 16) % self._buckets,
        }  # fmt: skip


class PairWorker:
    """One engine with a detector and a judge, in a Ray actor: rows of `Tag` -> one row `batch`."""

    def __init__(self, spec: str) -> None:
        self._spec = WorkerSpec.model_validate_json(spec)
        self._home = Path(tempfile.mkdtemp(prefix="reasonguard-ray-"))
        # The engine ends with this process, whose end of the pipe it reads.
        self._generator = Generator(self._spec.engine, self._home / "engine.log")
        self._generator.start()
        tokenizer = load_tokenizer(self._spec.engine.model)
        runtime = load_runtime(self._spec.engine.model, tokenizer, self._spec.policy, self._spec.detector)
        self._reader = PromptReader.build(tokenizer, runtime.table, runtime.grammar)
        self._tools = Tools.build(tokenizer, runtime, Judge.load(self._spec.judge), self._generator)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rolls out one batch."""
        import pyarrow as pa

        rows = sorted(table.to_pylist(), key=lambda row: str(row["id"]))
        ids = [str(row["id"]) for row in rows]
        traces, prompts, dropped = self._parse(rows)
        out = self._home / _digest("\n".join(ids))
        harvest = roll_out(traces, prompts, self._tools, self._spec.settings, out, one_by_one)
        harvest.dropped += dropped
        shutil.rmtree(out, ignore_errors=True)
        return pa.table({"batch": [Batch(ids=ids, harvest=harvest).model_dump_json()]})

    def _parse(self, rows: list[dict[str, Any]]) -> tuple[list[Trace], list[Prompt], Counter[str]]:
        from guard.parquet import trace_of

        traces: dict[str, Trace] = {}
        prompts: list[Prompt] = []
        dropped: Counter[str] = Counter()
        for row in rows:
            try:
                body = json.loads(row["body"])
                if row["kind"] == "prompt":
                    prompts.append(Prompt.model_validate(body))
                    continue
                trace = self._reader.restored(trace_of(body))
            except (ValidationError, ValueError, KeyError, TypeError):
                dropped[f"{row['kind']}: malformed row"] += 1
                continue
            reason = set_aside(trace, self._tools.runtime.tokenizer_hash, self._spec.writers)
            if reason is not None:
                dropped[f"trace: {reason}"] += 1
            elif trace.guard_id not in traces or traces[trace.guard_id].created < trace.created:
                # A preempted request is written again.
                traces[trace.guard_id] = trace
        return list(traces.values()), prompts, dropped


def _batches(path: Path) -> Iterator[Batch]:
    """What earlier runs brought; a torn last line is done again."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Batch.model_validate_json(line)
        except ValidationError:
            continue


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
