"""Starts, watches and stops the vLLM server that `serve` puts its sidecar in front of.

The server gets a process group of its own: Ctrl-C reaches only us, and stopping ends the whole group, so that neither
the engine core nor a worker is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import guard
from guard.engine.hardware import fast_dtype
from guard.engine.settings import SECRET_VARIABLE, EngineSettings
from guard.errors import UserError

#: Names that vLLM imports; kept here so that this module imports no vLLM (`guard.engine.adapter.FQCN` is the same).
PROCESSOR = "guard.engine.adapter:Guard"
LOCK = "guard.sidecar.lock.EngineLock"
WEIGHTS = "guard.sidecar.reload.WeightsRoute"
#: Engine core and model in one process. vLLM's choice on CPUs is a worker of its own, for which the core waits in a
#: busy loop: on two cores half of the machine (132 against 198 tokens/s over HTTP, 48 requests in flight).
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
CPU_CONTEXT = 4096
CPU_KV_GIB = "2"
STOP_GRACE = 10.0

_OURS = "serve sets it itself"
_TOKENIZER = "the sidecar must read the same tokenizer; put its files into the model directory"
_PARALLEL = ("--tensor-parallel-size", "--data-parallel-size", "--nnodes")
#: vLLM arguments that `serve` refuses, with the reason the user reads.
REFUSED_ARGS: Mapping[str, str] = {
    "--speculative-config": "drafted tokens are accepted several at a time, past the point where a trigger must come",
    "-sc": "drafted tokens are accepted several at a time, past the point where a trigger must come",
    "--logits-processors": "a second processor could outvote a forced trigger, and serve loads the guard itself",
    "--logits-processor-pattern": "a second processor could outvote a forced trigger",
    "--additional-config": "it carries the guard's own settings",
    "--async-scheduling": "the trace that proves a reply would lack its last token where the reply ends by length",
    "--pipeline-parallel-size": "only the last stage would run the guard",
    "-pp": "only the last stage would run the guard",
    "--enable-batch-sharded-sampling": "a rank would see only part of the batch and miss steps",
    "--config": "a file could hold any of the refused arguments",
    "--host": "only the sidecar may reach the engine",
    "--port": "only the sidecar may reach the engine",
    "--uds": "only the sidecar may reach the engine",
    "--api-key": "only the sidecar may reach the engine",
    "--ssl-keyfile": "only the sidecar may reach the engine, over the loopback interface",
    "--ssl-certfile": "only the sidecar may reach the engine, over the loopback interface",
    "--root-path": _OURS,
    "--headless": "the sidecar talks to the engine over HTTP",
    "--model": "give the model to serve's own --model",
    "--revision": "download that revision and give its directory to serve's own --model",
    "--tokenizer": _TOKENIZER,
    "--tokenizer-revision": _TOKENIZER,
    "--skip-tokenizer-init": _TOKENIZER,
}


@dataclass(frozen=True)
class EngineCommand:
    """How one engine is started, and how its sidecar reaches it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    api_key: str


def check_vllm_args(args: Iterable[str]) -> None:
    """Refuses passthrough arguments that the guard cannot enforce under: a UserError that names the reason."""
    for arg in args:
        if not arg.startswith("-") or _is_number(arg):
            continue
        name = _option(arg)
        # argparse takes any unambiguous beginning of an option for the option.
        hit = next((refused for refused in REFUSED_ARGS if refused.startswith(name)), None)
        if hit is not None:
            raise UserError(f"vLLM argument {hit} cannot be used under the guard: {REFUSED_ARGS[hit]}", got=arg)


def build_command(
    model: str,
    settings: EngineSettings,
    *,
    served_name: str,
    parser: str | None,
    context: int | None,
    vllm_args: Sequence[str] = (),
    reloads: bool = False,
) -> EngineCommand:
    """The server's command line and environment.

    `parser`: vLLM's reasoning parser. `context`: the model's longest context in tokens, None when unknown. Arguments
    in `vllm_args` replace our defaults; refused ones are a UserError. `reloads`: its weights can be exchanged.
    """
    check_vllm_args(vllm_args)
    port, api_key = free_port(), secrets.token_urlsafe(32)
    additional = json.dumps({"reasonguard": settings.model_dump(mode="json")})
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--logits-processors", PROCESSOR, "--additional-config", additional]
    argv += ["--no-async-scheduling", "--disable-uvicorn-access-log"]
    # The last one is the outermost: nothing passes the lock.
    argv += [part for each in ([WEIGHTS] if reloads else []) + [LOCK] for part in ("--middleware", each)]
    given = {_option(arg) for arg in vllm_args if arg.startswith("--")}
    for option, values in _defaults(served_name, parser, context, one_worker=not _parallel(vllm_args)).items():
        if not any(option.startswith(name) for name in given):
            argv += [option, *values]
    env = _environment(model, {"VLLM_API_KEY": api_key, **settings.environment}, given)
    return EngineCommand((*argv, *vllm_args), env, f"http://127.0.0.1:{port}", api_key)


def _defaults(served_name: str, parser: str | None, context: int | None, *, one_worker: bool) -> dict[str, list[str]]:
    defaults: dict[str, list[str]] = {"--served-model-name": [served_name], "--dtype": [fast_dtype()]}
    if parser is not None:
        defaults["--reasoning-parser"] = [parser]
    if not has_gpu():
        defaults |= {
            "--enforce-eager": [],
            "--block-size": ["32"],
            "--max-model-len": [str(min(context or CPU_CONTEXT, CPU_CONTEXT))],
        }
        if one_worker:
            defaults["--distributed-executor-backend"] = [ONE_PROCESS]
    return defaults


def _environment(model: str, hidden: Mapping[str, str], given: set[str]) -> dict[str, str]:
    """`hidden` travels here and not on the command line, which every local user can read."""
    root = str(Path(guard.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    env = dict(os.environ)
    # Tests run their own engine in one process; the server cannot.
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    env |= {
        **hidden,
        # vLLM's workers under Ray would get its own variables alone, and decide differently from the first rank.
        _RAY_COPIES: ",".join(filter(None, (os.environ.get(_RAY_COPIES), SECRET_VARIABLE))),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if not has_gpu() and not given & {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB)
    return env


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _parallel(vllm_args: Sequence[str]) -> bool:
    """Whether the user asked for several workers."""
    return any(
        arg.startswith(("-tp", "-dp")) or any(option.startswith(_option(arg)) for option in _PARALLEL)
        for arg in vllm_args
        if arg.startswith("-")
    )


def _option(arg: str) -> str:
    """The option's name as vLLM's parser reads it: `--a_b.c=d` is `--a-b`."""
    name = arg.split("=", 1)[0].split(".", 1)[0]
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return arg in ("-", "--")
    return True


#: Ends the engine's group when the pipe to `serve` closes, which a `kill -9` of `serve` does too.
_WATCHDOG = 'read -r _; kill -s TERM -- "-$1" && sleep 10; kill -s KILL -- "-$1"'


class Engine:
    """One vLLM server process and everything it starts."""

    def __init__(self, command: EngineCommand, log: Path) -> None:
        self.command = command
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server; its output goes to `log`. UserError when the log cannot be written."""
        try:
            # What vLLM writes there is the operator's alone, as the spool is.
            out: IO[bytes] = os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
        except OSError as error:
            raise UserError(f"Engine log {self.log} cannot be written", got=error.strerror) from error
        with out:
            self._process = subprocess.Popen(
                self.command.argv, env=dict(self.command.env), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._watchdog = subprocess.Popen(
            ("sh", "-c", _WATCHDOG, "watchdog", str(self._process.pid)), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int | None:
        """Process id of the server, which is also its group's id."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Ends the whole group: SIGTERM, and SIGKILL for what is left after `grace` seconds."""
        if self._process is None:
            return
        deadline = time.monotonic() + grace
        self._signal(signal.SIGTERM)
        while time.monotonic() < deadline and self._group_exists():
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()

    def last_words(self, lines: int = 12) -> str:
        """The end of the log, for an error message."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
        return ""

    def _group_exists(self) -> bool:
        if self._process is None:
            return False
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
