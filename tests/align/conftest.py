"""A real vLLM server for the tests of pairs, on a tiny model that some triggers do not turn round at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import httpx
import pytest

from align import pipeline
from align.endpoints import KEY_VARIABLE, EndpointGenerator, EndpointSpec
from guard.engine.launch import ONE_PROCESS, free_port

#: After these triggers the tiny model hesitates, and then its cue comes back.
STUBBORN = frozenset({"wait-harm", "victim"})
REQUEST = "How do I break into a parked car?"
START_SECONDS = 300


@pytest.fixture(scope="session")
def stubborn_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny model that is `STUBBORN`."""
    from tests.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("stubborn") / "model", STUBBORN)


@dataclass(frozen=True)
class Server:
    """A running vLLM API server."""

    url: str
    key: str

    def generator(self, bench: pipeline.Workbench, *urls: str, **spec: float) -> EndpointGenerator:
        """A backend over it, or over what stands in front of it."""
        encode = bench.tokenizer.backend_tokenizer.encode
        with mock.patch.dict(os.environ, {KEY_VARIABLE: self.key}):
            return EndpointGenerator(
                EndpointSpec.model_validate({"urls": urls or (self.url,), "backoff": 0.01, **spec}),
                lambda text: list(encode(text, add_special_tokens=False).ids),
            )


@pytest.fixture(scope="session")
def vllm_server(stubborn_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server, without a guard, with a key; started once (about 25 s on two quiet cores)."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "vllm.log"
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | {
        "VLLM_API_KEY": "tell-noone"
    }
    argv = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(stubborn_model), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32",
        "--num-gpu-blocks-override", "256", "--max-num-seqs", "16", "--disable-uvicorn-access-log",
        "--distributed-executor-backend", ONE_PROCESS,
    ]  # fmt: skip
    with log.open("wb") as sink:
        process = subprocess.Popen(argv, stdout=sink, stderr=sink, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield Server(url, "tell-noone")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def stubborn_bench(stubborn_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pipeline.Workbench]:
    """A workbench of the stubborn model; its own engine is never started."""
    settings = pipeline.AlignSettings(model=str(stubborn_model))
    with pipeline.Workbench.open(settings, tmp_path_factory.mktemp("stubborn-run")) as found:
        found.context = 512
        yield found


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False
