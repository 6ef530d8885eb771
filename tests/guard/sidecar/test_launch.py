"""The vLLM command line, what it refuses, and that stopping leaves nothing; which models are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from guard.engine import launch
from guard.engine.launch import REFUSED_ARGS, Engine, EngineCommand, build_command, check_vllm_args
from guard.engine.settings import SECRET_VARIABLE, EngineSettings
from guard.errors import UserError
from guard.sidecar.lock import EngineLock
from guard.sidecar.model import find_model

SECRET = "the-guards-secret"


def command(tmp_path: Path, *args: str, context: int | None = 8192, parser: str | None = "p") -> EngineCommand:
    settings = EngineSettings(spool=tmp_path, secret=SECRET)
    return build_command(str(tmp_path), settings, served_name="m", parser=parser, context=context, vllm_args=args)


def option(made: EngineCommand, name: str) -> str:
    assert made.argv.count(name) == 1
    return made.argv[made.argv.index(name) + 1]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_gpu", lambda: False)


def test_the_command_loads_the_guard_and_hides_the_key(tmp_path: Path) -> None:
    from guard.engine.adapter import FQCN

    made = command(tmp_path)
    assert made.argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert option(made, "--logits-processors") == FQCN
    assert option(made, "--middleware") == f"{EngineLock.__module__}.{EngineLock.__name__}"
    assert json.loads(option(made, "--additional-config")) == {"reasonguard": {
        "policy": None, "detector": None, "detectors": None, "spool": str(tmp_path), "allow_off": False,
    }}  # fmt: skip
    assert (option(made, "--host"), made.url) == ("127.0.0.1", f"http://127.0.0.1:{option(made, '--port')}")
    assert (option(made, "--reasoning-parser"), option(made, "--served-model-name")) == ("p", "m")
    assert (option(made, "--max-model-len"), option(made, "--block-size")) == ("4096", "32")
    assert {"--no-async-scheduling", "--enforce-eager"} < set(made.argv)
    assert made.env["VLLM_API_KEY"] == made.api_key
    assert made.api_key not in made.argv
    assert made.env["HF_HUB_DISABLE_TELEMETRY"] == made.env["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in made.env
    assert made.api_key != command(tmp_path).api_key


def test_the_secret_is_in_the_environment_alone_and_the_engine_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    made, settings = command(tmp_path), EngineSettings(spool=tmp_path, secret=SECRET)
    assert not any(SECRET in arg for arg in made.argv)
    assert SECRET not in repr(settings) + settings.model_dump_json()
    assert made.env["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "MINE,REASONGUARD_ENGINE_SECRET"
    given = json.loads(option(made, "--additional-config"))["reasonguard"]
    assert EngineSettings.received(given).secret is None
    monkeypatch.setenv(SECRET_VARIABLE, made.env[SECRET_VARIABLE])
    assert EngineSettings.received(given) == settings
    assert EngineSettings.received({**given, "secret": "by-hand"}).secret == "by-hand"
    with pytest.raises(ValidationError) as caught:
        EngineSettings.received({})
    assert SECRET not in str(caught.value)


def test_only_the_operator_can_read_the_engines_log(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        engine = Engine(EngineCommand((sys.executable, "-c", ""), {}, "", ""), tmp_path / "engine.log")
        engine.start()
    finally:
        os.umask(before)
    engine.stop()
    assert engine.log.stat().st_mode & 0o777 == 0o600


def test_passthrough_replaces_defaults(tmp_path: Path) -> None:
    made = command(tmp_path, "--dtype", "float32", "--max_model_len=512", "--served-model-name", "other", context=256)
    assert option(made, "--dtype") == "float32"
    assert "--max-model-len" not in made.argv
    assert option(made, "--served-model-name") == "other"
    assert option(command(tmp_path, context=256), "--max-model-len") == "256"
    assert "--reasoning-parser" not in command(tmp_path, parser=None).argv


@pytest.mark.parametrize(
    ("args", "one"),
    [((), True), (("--seed", "3"), True), (("-tp", "2"), False), (("-tp=2",), False), (("-dp", "2"), False),
     (("--tensor_parallel_size=2",), False), (("--tensor", "2"), False), (("--data-parallel-size", "2"), False)],
)  # fmt: skip
def test_engine_and_model_share_a_process_unless_several_workers_are_asked_for(
    tmp_path: Path, args: tuple[str, ...], one: bool
) -> None:
    assert ("--distributed-executor-backend" in command(tmp_path, *args).argv) is one


#: Whatever else is refused, these are: what the docs promise.
ALWAYS = {
    "--speculative-config", "-sc", "--logits-processors", "--logits-processor-pattern", "--additional-config",
    "--pipeline-parallel-size", "-pp", "--enable-batch-sharded-sampling", "--config", "--host", "--api-key",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*REFUSED_ARGS, *ALWAYS}))
def test_what_the_guard_cannot_enforce_under_is_refused_with_the_reason(name: str) -> None:
    wanted = f"vLLM argument {name} cannot be used under the guard: {REFUSED_ARGS[name]}; got {name}."
    with pytest.raises(UserError) as caught:
        check_vllm_args(["--dtype", "float32", name, "x"])
    assert str(caught.value) == wanted


@pytest.mark.parametrize(("arg", "name"), [
    ("--speculative_config={}", "--speculative-config"), ("--speculative-config.method", "--speculative-config"),
    ("--spec", "--speculative-config"), ("--logits_processors=x", "--logits-processors"), ("-pp=2", "-pp"),
    ("--pipeline", "--pipeline-parallel-size"), ("--additional", "--additional-config"),
    ("--additional-config.reasonguard.allow_off=true", "--additional-config"),
])  # fmt: skip
def test_other_spellings_are_refused_too(arg: str, name: str) -> None:
    with pytest.raises(UserError, match=f"^vLLM argument {name} cannot"):
        check_vllm_args([arg])


def test_other_arguments_pass() -> None:
    check_vllm_args(["--max-model-len", "512", "--tokenizer-mode", "auto", "-tp", "2", "--seed", "-1"])
    check_vllm_args(["--model-impl", "x", "--no-async-scheduling"])


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_stop_ends_a_group_that_ignores_sigterm(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", STUBBORN)
    engine = Engine(EngineCommand(argv, {}, "", ""), tmp_path / "engine.log")
    assert not engine.alive
    engine.start()
    while "up" not in engine.last_words() or "child" not in engine.last_words():
        assert engine.alive
        time.sleep(0.02)
    child = int(engine.last_words().split("child ")[1].split()[0])
    engine.stop(grace=0.3)
    assert not engine.alive
    deadline = time.monotonic() + 5
    while _runs(child):
        assert time.monotonic() < deadline, "the child was left behind"
        time.sleep(0.02)


def test_stop_of_a_willing_engine_is_quick(tmp_path: Path) -> None:
    engine = Engine(EngineCommand((sys.executable, "-c", "import time; time.sleep(600)"), {}, "", ""), tmp_path / "log")
    engine.start()
    began = time.monotonic()
    engine.stop()
    assert time.monotonic() - began < 5
    engine.stop()


ORPHANED = """
import os, sys
from pathlib import Path
from guard.engine.launch import Engine, EngineCommand
engine = Engine(EngineCommand((sys.executable, "-c", "import time; time.sleep(600)"), {}, "", ""), Path(sys.argv[1]))
engine.start()
print(engine.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_engine_does_not_outlive_a_killed_serve(tmp_path: Path) -> None:
    root = str(Path(launch.__file__).parents[2])
    killed = subprocess.run(
        [sys.executable, "-c", ORPHANED, str(tmp_path / "log")], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    deadline = time.monotonic() + 5
    while _runs(int(killed.stdout)):
        assert time.monotonic() < deadline, "the engine was left behind"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_models_are_checked_before_anything_starts(tiny_model: Path, tmp_path: Path) -> None:
    found = find_model(str(tiny_model))
    assert (found.location, found.name, found.context) == (str(tiny_model), "model", 2048)
    wanted = "wanted a directory with config.json and tokenizer.json, a hub name, or `demo`."
    for asked in (str(tmp_path / "none"), "none", "a/b/c"):
        with pytest.raises(UserError) as caught:
            find_model(asked)
        assert str(caught.value) == f"Model {Path(asked).resolve()} does not exist; {wanted}"
    with pytest.raises(UserError) as caught:
        find_model(str(tmp_path))
    assert str(caught.value) == f"Model {tmp_path} holds no config.json; {wanted}"
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json or tokenizer\.json is damaged"):
        find_model(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^Model no-such/model is no directory here, and its config\.json could not"):
        find_model("no-such/model")
