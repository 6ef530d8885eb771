"""The spool follower: torn lines, new files, superseded traces, bounds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.errors import UserError
from guard.policy import Policy
from guard.sidecar.receipts import SpoolFollower
from guard.traces import Spool, Trace
from tests.guard.sidecar.scripted import trace_of

POLICY = Policy()


def line(guard_id: str, tokens: int = 3) -> bytes:
    return trace_of(guard_id, POLICY, tokens=tokens).model_dump_json().encode() + b"\n"


def follow(directory: Path, work: Callable[[SpoolFollower], Coroutine[Any, Any, Any]]) -> Any:
    """Runs `work` beside a running follower."""

    async def run() -> Any:
        follower = SpoolFollower(directory)
        task = asyncio.create_task(follower.run())
        try:
            return await work(follower)
        finally:
            task.cancel()

    return asyncio.run(run())


def complete(trace: Trace) -> bool:
    return len(trace.output_ids) == 3


def test_a_trace_written_before_the_wait_is_there_at_once(tmp_path: Path) -> None:
    async def work(follower: SpoolFollower) -> Trace | None:
        follower.expect("a")
        Spool(tmp_path).append(trace_of("a", POLICY))
        return await follower.wait("a", complete, 5)

    assert follow(tmp_path, work) == trace_of("a", POLICY)


def test_a_torn_line_is_waited_for(tmp_path: Path) -> None:
    async def work(follower: SpoolFollower) -> tuple[int, Trace | None]:
        follower.expect("a")
        with (tmp_path / "spool-x.jsonl").open("ab", buffering=0) as out:
            out.write(line("a")[:40])
            await asyncio.sleep(0.4)
            malformed = follower.malformed
            out.write(line("a")[40:])
        return malformed, await follower.wait("a", complete, 5)

    assert follow(tmp_path, work) == (0, trace_of("a", POLICY))


def test_a_damaged_line_is_counted_and_skipped(tmp_path: Path) -> None:
    async def work(follower: SpoolFollower) -> tuple[int, bool]:
        follower.expect("a")
        (tmp_path / "spool-x.jsonl").write_bytes(b"\xff{\n\n" + b'{"guard_id": "a"}\n' + line("a"))
        found = await follower.wait("a", complete, 5)
        return follower.malformed, found is not None

    assert follow(tmp_path, work) == (2, True)


def test_the_later_line_supersedes_and_an_early_one_does_not_match(tmp_path: Path) -> None:
    async def work(follower: SpoolFollower) -> list[int]:
        follower.expect("a")
        (tmp_path / "spool-x.jsonl").write_bytes(line("a", 1))
        early = await follower.wait("a", complete, 0.3)
        (tmp_path / "spool-y.jsonl").write_bytes(line("a", 3))
        late = await follower.wait("a", complete, 5)
        return [len(t.output_ids) for t in (early, late) if t]

    assert follow(tmp_path, work) == [1, 3]


def test_missing_traces_end_the_wait_in_time(tmp_path: Path) -> None:
    async def work(follower: SpoolFollower) -> tuple[Trace | None, float]:
        follower.expect("a")
        began = time.monotonic()
        return await follower.wait("a", complete, 0.2), time.monotonic() - began

    trace, seconds = follow(tmp_path, work)
    assert trace is None
    assert 0.2 <= seconds < 2


def test_old_content_is_skipped_and_only_requests_in_flight_are_held(tmp_path: Path) -> None:
    (tmp_path / "spool-old.jsonl").write_bytes(line("a") + b'{"torn')
    (tmp_path / "engine-1.log").write_bytes(line("a"))
    follower = SpoolFollower(tmp_path)
    follower.expect("a")
    with (tmp_path / "spool-old.jsonl").open("ab") as out:
        out.write(b'"}\n' + line("b"))
    follower.poll()
    assert (follower.malformed, follower.held) == (1, 1)
    assert follower._expected["a"].trace is None
    follower.forget("a")
    assert follower.held == 0


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "spool-x.jsonl"
    path.write_bytes(line("old") * 3)
    follower = SpoolFollower(tmp_path)
    follower.expect("a")
    path.write_bytes(line("a"))
    follower.poll()
    assert follower._expected["a"].trace == trace_of("a", POLICY)
    path.unlink()
    follower.poll()
    assert follower._files == {}


@pytest.fixture
def charged(tmp_path: Path) -> tuple[SpoolFollower, list[int]]:
    """A follower that has charged the 4 tokens of a tenant's only trace."""
    follower, tokens = SpoolFollower(tmp_path), list[int]()
    follower.charge = lambda _, amount: tokens.append(amount)
    trace = trace_of("a", POLICY).model_copy(update={"tenant": "team-a"})
    Spool(tmp_path).append(trace)
    follower.poll()
    assert tokens == [4]
    return follower, tokens


def test_a_scan_that_fails_charges_nothing_again(
    charged: tuple[SpoolFollower, list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    follower, tokens = charged

    def full(_: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", full)
        follower.poll()
        with pytest.raises(UserError, match="cannot be read; got Too many open files"):
            SpoolFollower(tmp_path)
    follower.poll()
    assert tokens == [4]


def test_a_file_that_is_pruned_under_the_scan_costs_the_others_nothing(
    charged: tuple[SpoolFollower, list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    follower, tokens = charged
    old, scandir = tmp_path / "spool-old.jsonl", os.scandir
    old.write_bytes(line("old"))
    follower.poll()

    @contextlib.contextmanager
    def pruned(directory: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(directory) as entries:
            found = list(entries)
        old.unlink()
        yield found

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", pruned)
        follower.poll()
    follower.poll()
    assert tokens == [4]
    assert old not in follower._files


def test_a_missing_directory_is_no_crash(tmp_path: Path) -> None:
    follower = SpoolFollower(tmp_path / "none")
    follower.poll()
    (tmp_path / "none").mkdir()
    follower.expect("a")
    Spool(tmp_path / "none").append(trace_of("a", POLICY))
    follower.poll()
    assert follower._expected["a"].trace is not None


def test_waiting_for_what_was_not_expected_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        asyncio.run(SpoolFollower(tmp_path).wait("a", complete))
