from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.errors import UserError
from guard.traces import (
    GuardTime,
    Intervention,
    Lengths,
    ReadReport,
    Receipt,
    Spool,
    StepRecord,
    Trace,
    read_traces,
    summary,
)

ROOT = Path(__file__).parents[2]


def make(guard_id: str = "a", request: str = "How?", **receipt: Any) -> Trace:
    return Trace(
        guard_id=guard_id, created=1.5, model="m", tokenizer_hash="0" * 12, request=request, prompt_ids=[1, 2],
        output_ids=[3, 4, 5],
        steps=[
            StepRecord(start=0, end=1, zone="reasoning", score=0.875, cue=True),
            StepRecord(start=1, end=2, zone="reasoning", score=None, cue=False, injected=True),
        ],
        receipt=Receipt(
            guard_id=guard_id, policy="default", policy_hash="f" * 12, detector="d", engine="vllm-v1", seen=1, scored=1,
            injected_tokens=1,
            interventions=[Intervention(step=0, at=1, trigger_id="victim", score=0.875, forced=1, completed=True)],
            **receipt,
        ),
    )  # fmt: skip


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_round_trip(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new" / "spool")
    traces = [make("a"), make("b", request="two\nlines \u2028 and 这样"), make("c", errors=["detector: x"])]
    for trace in traces:
        spool.append(trace)
    read, report = read_traces(tmp_path / "new" / "spool")
    assert read == traces
    assert report == ReadReport(files=1, traces=3)
    (path,) = (tmp_path / "new" / "spool").iterdir()
    assert re.fullmatch(rf"spool-\d{{8}}-{os.getpid()}\.jsonl", path.name)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes().split(b"\n")) == 4  # one line a trace, whatever it holds


def test_the_guards_time_is_kept_and_older_traces_have_none() -> None:
    trace = make()
    assert (trace.guard_time, trace.guard_us) == (None, None)
    before = json.loads(trace.model_dump_json())
    del before["guard_time"]
    assert Trace.model_validate(before) == trace
    timed = trace.model_copy(update={"guard_time": GuardTime(request=1500, steps=[30, 2000])})
    assert timed.guard_us == 3530
    for kept in (timed, timed.keeping("none")):
        assert Trace.model_validate_json(kept.model_dump_json()) == kept
        assert kept.guard_us == 3530
    with pytest.raises(ValidationError):
        GuardTime(steps=[-1])


@given(st.text(max_size=60), st.floats(0, 1), st.lists(st.integers(-(2**40), 2**40), max_size=8))
def test_any_trace_is_one_line_that_reads_back(request_text: str, score: float, ids: list[int]) -> None:
    trace = make(request=request_text).model_copy(update={"output_ids": ids})
    trace.steps[0].score = score
    line = trace.model_dump_json()
    assert "\n" not in line
    assert Trace.model_validate_json(line) == trace


def test_torn_and_foreign_lines_are_counted_skipped_and_left(tmp_path: Path) -> None:
    Spool(tmp_path).append(make("a"))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    newer = json.dumps({**json.loads(whole), "schema_version": 2}).encode() + b"\n"
    extra = json.dumps({**json.loads(whole), "surprise": 1}).encode() + b"\n"
    path.write_bytes(
        whole[:50] + b"\n" + newer + b"\xff\xfe\n\n" + extra + make("b").model_dump_json().encode() + b"\n" + whole[:70]
    )
    before = path.read_bytes()
    read, report = read_traces(tmp_path)
    assert [t.guard_id for t in read] == ["b"]
    assert report == ReadReport(files=1, traces=1, malformed=5)
    assert path.read_bytes() == before


def test_the_line_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    Spool(tmp_path).append(make("a"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:70])  # killed while writing; a new process may have the same id
    Spool(tmp_path).append(make("b"))
    read, report = read_traces(tmp_path)
    assert [t.guard_id for t in read] == ["b"]
    assert report == ReadReport(files=1, traces=1, malformed=1)


def test_a_later_line_supersedes_in_place(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for trace in (make("a", request="old"), make("b"), make("a", request="new")):
        spool.append(trace)
    read, report = read_traces(tmp_path)
    assert [(t.guard_id, t.request) for t in read] == [("a", "new"), ("b", "How?")]
    assert report == ReadReport(files=1, traces=2, superseded=1)


def test_other_files_are_not_read(tmp_path: Path) -> None:
    Spool(tmp_path).append(make("a"))
    (tmp_path / "notes.jsonl").write_text("no trace\n")
    assert read_traces(tmp_path)[1] == ReadReport(files=1, traces=1)
    with pytest.raises(UserError, match="none does not exist"):
        read_traces(tmp_path / "none")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/spool cannot be made"):
        Spool(tmp_path / "file" / "spool")


WRITER = """
    import os, sys, time
    from pathlib import Path
    from guard.traces import Spool
    from tests.guard.test_traces import make
    spool = Spool(Path(sys.argv[1]))
    os.getpid = lambda: 7  # two processes in two containers may have one process id
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(300):
        spool.append(make(f"{sys.argv[2]}-{i}", request=sys.argv[2] * (i * 37 % 9000)))
"""


def test_two_processes_appending_to_one_file_keep_whole_lines(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), name], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for name in "xy"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    read, report = read_traces(tmp_path)
    assert report == ReadReport(files=1, traces=600)
    by_id = {t.guard_id: len(t.request) for t in read}
    assert by_id == {f"{name}-{i}": i * 37 % 9000 for name in "xy" for i in range(300)}


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from guard.traces import Spool, read_traces
    from tests.guard.test_traces import make
    directory = Path(sys.argv[1])
    spool = Spool(directory)
    spool.append(make("first"))
    (path,) = directory.iterdir()
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    for guard_id in ("torn", "none"):
        try:
            spool.append(make(guard_id))
        except OSError as error:
            print(guard_id, type(error).__name__, error.errno)
    print(path.stat().st_size - size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    spool.append(make("next"))
    traces, report = read_traces(directory)
    print([t.guard_id for t in traces], report.malformed)
"""


def test_a_full_disk_is_an_os_error_and_the_next_append_is_readable(tmp_path: Path) -> None:
    done = run_python(FULL_DISK, str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["torn OSError 28", "none OSError 27", "100", "['first', 'next'] 1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_unwritable_directory_is_an_os_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    (tmp_path / "spool").rmdir()
    with pytest.raises(OSError, match="No such file"):
        spool.append(make())


@pytest.mark.parametrize(
    ("damage", "clean"),
    [({}, True), ({"unscored": 1}, False), ({"enforcement_failed": 1}, False), ({"errors": ["x"]}, False)],
)
def test_clean_means_nothing_was_missed(damage: dict[str, Any], clean: bool) -> None:
    assert make(**damage).receipt.clean is clean


def test_summary_row() -> None:
    assert summary(make()) == {
        "guard_id": "a", "request": "How?", "tokens": 3, "steps": 1, "cues": 1, "interventions": 1, "clean": True,
    }  # fmt: skip


def test_what_a_trace_keeps() -> None:
    errors = ["detector: ValueError: got 'sesame'", "engine appended 17 where 34 was forced", "observe: KeyError: 5"]
    trace = make(request="sesame", errors=errors)
    trace.receipt.interventions.append(
        Intervention(step=1, at=1, trigger_id="victim", mode="substitute", cue_ids=[77, 78], score=0.9)
    )
    assert trace.keeping("full") is trace
    ids, none = trace.keeping("ids"), trace.keeping("none")
    kinds = ["detector: ValueError", "engine appended # where # was forced", "observe: KeyError"]
    receipt = trace.receipt.model_copy(update={"errors": kinds})
    assert ids == trace.model_copy(update={"log_content": "ids", "request": "", "receipt": receipt})
    lengths = Lengths(prompt=2, output=3, replaced=2)
    bare = {"log_content": "none", "prompt_ids": [], "output_ids": [], "lengths": lengths}
    assert none.receipt.interventions == [
        i.model_copy(update={"cue_ids": []}) for i in trace.receipt.interventions
    ]  # fmt: skip
    bare["receipt"] = receipt.model_copy(update={"interventions": none.receipt.interventions})
    assert none == ids.model_copy(update=bare)
    assert ids.receipt.interventions[1].cue_ids == [77, 78]
    assert "sesame" not in ids.model_dump_json()
    assert trace.request == "sesame"
    for kept in (trace, ids, none):
        assert (kept.prompt_tokens, kept.output_tokens, kept.replaced_tokens, kept.cues) == (2, 3, 2, 2)
        assert kept.keeping("none") == none
        assert Trace.model_validate_json(kept.model_dump_json()) == kept
    assert none.keeping("full") is none
    assert ids.keeping("full") is ids
    assert summary(none) == summary(trace) | {"request": "", "clean": False}
