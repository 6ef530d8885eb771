"""`cli.py` as it is, but for vLLM: `serve` starts a scripted engine, so that a start takes seconds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cli
from classifiers.detector import Detector
from guard.engine.launch import EngineCommand, free_port
from guard.engine.settings import EngineSettings
from guard.policy import load_policy
from guard.runtime import GuardRuntime
from guard.sidecar import serve
from guard.sidecar.model import find_model

ENGINE = "tests.guard.sidecar.scripted_process"
ROOT = Path(__file__).parents[2]


def command(model: str, settings: EngineSettings, **_: Any) -> EngineCommand:
    """The scripted engine's command line in the place of vLLM's."""
    found = find_model(model)
    runtime = GuardRuntime.build(
        load_policy(settings.policy), Detector.load(), found.tokenizer, found.location, found.eos
    )
    trigger, port = runtime.triggers[0], free_port()
    argv = (sys.executable, "-m", ENGINE, "--port", str(port), str(settings.spool), str(settings.policy or "-"))
    argv += (runtime.detector.version, trigger.id, json.dumps(list(trigger.spaced)))
    env = {**os.environ, "VLLM_API_KEY": "key", "PYTHONPATH": str(ROOT)}
    return EngineCommand(argv, env, f"http://127.0.0.1:{port}", "key")


if __name__ == "__main__":
    serve.build_command = command  # type: ignore[assignment]
    serve.has_gpu = lambda: False
    cli.main()
