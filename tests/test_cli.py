"""The command line as a user runs it: sentences, exit codes, traces, and a real `serve` that Ctrl-C ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from guard.cli import harmless
from guard.doctor import doctor
from guard.engine.launch import free_port
from guard.policy import Policy
from guard.store.reading import find
from guard.store.store import Store
from guard.traces import Intervention, Receipt, Spool, StepRecord, Trace, read_traces
from tests.guard.sidecar.serving import running

ROOT = Path(__file__).parent.parent
START_SECONDS = 300


def cli(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
    wide = {**os.environ, "COLUMNS": "200", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=wide, check=False)


def sentence(result: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line of a user error; exit code 2 and nothing else on stderr."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_help_is_quick_and_names_every_command() -> None:
    began = time.monotonic()
    result = cli("--help")
    seconds = time.monotonic() - began
    assert result.returncode == 0
    for command in ("serve", "keys", "align", "csr", "triggers", "classifier", "traces", "demo", "doctor"):
        assert f" {command} " in result.stdout
    # 0.4 s on a quiet machine; torch alone would take more than this.
    assert seconds < 3


def test_a_bad_policy_names_the_key(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("treshold: 0.5\n")
    keys = ", ".join(Policy.model_fields)
    finding = f"error: Policy file {policy}, key `treshold`: Extra inputs are not permitted; got 0.5."
    result = cli("serve", "--model", tmp_path, "--policy", policy, "--port", 0)
    assert sentence(result) == f"{finding} Known keys: {keys}."


def test_an_unknown_model_path(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    wanted = (
        f"error: Model {missing} does not exist; wanted a directory with config.json and tokenizer.json, a hub name, "
        "or `demo`."
    )
    assert sentence(cli("serve", "--model", missing, "--port", 0, "--traces", tmp_path)) == wanted


def test_an_argument_that_the_guard_cannot_work_under(tmp_path: Path) -> None:
    result = cli("serve", "--model", tmp_path, "--port", 0, "--", "--speculative-config", "{}")
    assert sentence(result) == (
        "error: vLLM argument --speculative-config cannot be used under the guard: drafted tokens are accepted several "
        "at a time, past the point where a trigger must come; got --speculative-config."
    )


def test_a_bad_file_of_keys_names_the_place(tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n- {name: a, key: rg-secret}\n")
    result = cli("serve", "--model", tiny_model, "--port", 0, "--traces", tmp_path, "--keys", keys)
    assert sentence(result) == (f"error: File of keys {keys}, key `keys.0.hash`: Field required. Known keys: keys.")


def test_a_damaged_detector(tiny_model: Path, tmp_path: Path) -> None:
    detector = tmp_path / "detector"
    detector.mkdir()
    (detector / "manifest.json").write_text("{}")
    result = cli("serve", "--model", tiny_model, "--detector", detector, "--port", 0, "--traces", tmp_path / "traces")
    assert sentence(result) == f"error: {detector}/manifest.json is malformed at kind; got Field required."
    assert not (tmp_path / "traces").exists()


def test_a_port_in_use_starts_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = cli("serve", "--model", tiny_model, "--port", port, "--traces", tmp_path / "traces")
    wanted = f"error: Cannot listen on 127.0.0.1:{port}; got Address already in use. Give another --port."
    assert sentence(result) == wanted
    assert not (tmp_path / "traces").exists()


def test_doctor_checks_hashes_and_policy(tmp_path: Path) -> None:
    result = cli("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for check in ("python", "packages", "model runner", "detector", "judge", "policy"):
        assert f"│ {check} " in result.stdout
    assert "hash checked" in result.stdout
    policy = tmp_path / "policy.yaml"
    policy.write_text("triggers: [none]\n")
    result = cli("doctor", "--policy", policy, "--url", f"http://127.0.0.1:{free_port()}")
    assert sentence(result, 1) == "error: doctor found a problem with: policy, server."
    assert "unknown trigger id; got none" in result.stdout


def test_doctor_reads_a_models_tokens_and_names_arguments_it_cannot_guard(tiny_model: Path) -> None:
    result = cli("doctor", "--model", tiny_model, "--features", "--", "--speculative-config", "{}")
    assert sentence(result, 1) == "error: doctor found a problem with: engine arguments."
    flat = " ".join(result.stdout.replace("│", " ").split())
    zones = "from answer to reasoning by <think> (3), from reasoning to answer by </think> (4), replies end with"
    assert f"{zones} <|im_end|> (2), vLLM's reasoning parser: deepseek_r1" in flat
    assert "vLLM argument --speculative-config cannot be used under the guard" in flat
    assert "refused at start" in flat
    fine = cli("doctor", "--model", tiny_model, "--", "--max-model-len", "512")
    assert fine.returncode == 0, fine.stdout
    lost = cli("doctor", "--inject")
    assert (lost.returncode, sentence(lost)) == (2, "error: --inject starts a server. Say on which --model.")


HOSTILE = "How\x1b[31m do [bold]I[/bold] \u202eopen\x07 it?"


@pytest.fixture
def traces(tiny_model: Path, tmp_path: Path) -> Path:
    """A spool with one trace of the tiny tokenizer, hostile text in it, and a torn line."""
    from tokenizers import Tokenizer

    from guard.runtime import tokenizer_hash

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    cue = tokenizer.encode("[red]bad\x1b]0;x\x07", add_special_tokens=False).ids
    trigger = tokenizer.encode(" Stop, this", add_special_tokens=False).ids
    end = len(cue) + len(trigger)
    receipt = Receipt(
        guard_id="g1", policy="default", policy_hash="0" * 12, detector="d1", engine="vllm-v1", seen=1, scored=1,
        injected_tokens=len(trigger),
        interventions=[
            Intervention(step=0, at=len(cue), trigger_id="danger", score=0.987, forced=len(trigger), completed=True)
        ],
    )  # fmt: skip
    steps = [
        StepRecord(start=0, end=len(cue), zone="reasoning", score=0.987, cue=True),
        StepRecord(start=len(cue), end=end, zone="reasoning", score=None, cue=False, injected=True),
    ]
    trace = Trace(
        guard_id="g1", created=1.0, model=str(tiny_model), tokenizer_hash=tokenizer_hash(tokenizer), request=HOSTILE,
        prompt_ids=[1], output_ids=[*cue, *trigger], steps=steps, receipt=receipt,
    )  # fmt: skip
    spool = tmp_path / "spool"
    Spool(spool).append(trace)
    Spool(spool).append(trace.model_copy(update={"guard_id": "g2", "created": 2.0, "request": "Later"}))
    with next(spool.iterdir()).open("ab") as out:
        out.write(b'{"guard_id": "torn\n')
    return spool


def test_traces_ls_counts_a_malformed_line(traces: Path) -> None:
    result = cli("traces", "ls", traces)
    assert result.returncode == 0
    assert result.stderr == "2 traces in 1 files; 1 malformed lines skipped, 0 superseded.\n"
    assert "│ How[31m do [bold]I[/bold] open it? " in result.stdout
    assert "\x1b" not in result.stdout
    rows = [json.loads(line) for line in cli("traces", "ls", traces, "--json", "--limit", 1).stdout.splitlines()]
    assert rows == [{
        "created": 2.0, "guard_id": "g2", "request": "Later", "tokens": rows[0]["tokens"], "steps": 1, "cues": 1,
        "interventions": 1, "clean": True,
    }]  # fmt: skip


def test_traces_show_reads_hostile_text_safely(traces: Path, tiny_model: Path) -> None:
    for extra in ([], ["--model", tiny_model]):
        result = cli("traces", "show", traces, "g1", *extra)
        assert result.returncode == 0, result.stderr
        rows = [[cell.strip() for cell in line.split("│")[2:-1]] for line in result.stdout.splitlines() if "│" in line]
        assert rows == [
            ["reasoning", "0.987", "cue", "[red]bad]0;x"],
            ["reasoning", "", "danger", "Stop, this"],
        ]
        assert "\x1b" not in result.stdout
        assert "\x07" not in result.stdout
    wanted = f"error: No trace g9 in {traces}. `traces ls` lists what there is."
    assert sentence(cli("traces", "show", traces, "g9")) == wanted


def test_harmless_keeps_words_and_drops_what_moves_a_terminal() -> None:
    assert harmless("a\x1b[2J\u202eb\u200d\ud800 \n c é 漢").plain == "a[2Jb c é 漢"
    assert harmless("x" * 500, 10).plain == "x" * 9 + "…"


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """A real `cli.py serve` in a session of its own, as a terminal would start it."""
    port = free_port()
    args = ["serve", "--model", tiny_model, "--port", port, "--traces", tmp_path / "traces"]
    passed = ["--", "--dtype", "float32", "--num-gpu-blocks-override", "256"]
    out = tmp_path / "serve.out"
    with out.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *map(str, args), *passed], stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    yield process, port, out
    for pid in [process.pid, *_descendants(process.pid)]:
        _kill(pid)
    process.wait()


def test_ctrl_c_while_serving_leaves_nothing(server: tuple[subprocess.Popen[bytes], int, Path]) -> None:
    process, port, out = server
    deadline = time.monotonic() + START_SECONDS
    while _ready(port) != 200:
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.5)
    result = cli("doctor", "--url", f"http://127.0.0.1:{port}")
    assert result.returncode == 0, result.stdout
    assert "ready: a trigger was forced" in result.stdout
    children = _descendants(process.pid)
    # vLLM's API server and its engine core, at the least.
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert [pid for pid in children if _runs(pid)] == []
    said = out.read_text()
    assert f"Ready: http://127.0.0.1:{port}/v1 serves model" in said
    assert said.endswith("Stopped.\n")
    assert "Traceback" not in said
    # What the engine wrote, up to its end, is in the store as well.
    store = Store.open(f"sqlite:///{out.parent}/traces/store.db")
    written, _ = read_traces(out.parent / "traces")
    assert written
    assert [find(store, trace.guard_id) for trace in written] == written
    store.close()


def test_an_engine_that_does_not_start_is_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    result = cli("serve", "--model", tiny_model, "--port", 0, "--traces", traces, "--", "--no-such-option")
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    log = next(traces.glob("engine-*.log"))
    assert last.startswith("error: The engine stopped while it was starting; got ")
    assert "unrecognized arguments: --no-such-option" in last
    assert last.endswith(f"Read {log}.")


def _ready(port: int) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=90, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def _descendants(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [each for child in children for each in _descendants(child)]


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_doctor_names_a_server_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    front = Starlette(routes=[Route("/ready", lambda _: JSONResponse([1]))])
    with running(front) as url, pytest.raises(typer.Exit):
        doctor(url=url)
    assert "gives no /ready of ours" in " ".join(capsys.readouterr().out.split())
