"""What tests of the aligner share: a real vLLM server on a tiny model that some triggers do not turn round at once, and
one training stage over a small model that learns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align import pipeline
from align.endpoints import KEY_VARIABLE, EndpointGenerator, EndpointSpec
from align.pairs import Pair
from align.text import ReplyReader
from align.train import train
from guard.engine.launch import ONE_PROCESS, free_port
from guard.steps import TokenTable
from guard.zones import find_grammar
from tests.align.small import LIMITS, SMALL
from tests.tiny import CUE, OPENING, PLAN

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


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def reader(tokenizer: Any) -> ReplyReader:
    backend = tokenizer.backend_tokenizer
    return ReplyReader(TokenTable.from_tokenizer(backend), find_grammar(backend))


@pytest.fixture(scope="session")
def small_model(tiny_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer over random weights: those of the scripted one are mostly zero and learn nothing."""
    target = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def pairs(tokenizer: Any) -> list[Pair]:
    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    found = []
    for n in range(8):
        kind = "intervened" if n % 2 else "benign"
        cue, trigger = ids(" " + CUE), ids(" Wait, this could hurt somebody.")
        chosen, rejected = (trigger, cue) if kind == "intervened" else (ids(" " + PLAN[0]), trigger)
        found.append(
            Pair(
                id=f"pair-{n}", kind=kind, guard_id=f"trace-{n}", request=f"request {n}",
                prompt_ids=ids(f"<|im_start|>user\nrequest {n}<|im_end|>\n<think>\n"), prefix_ids=ids(OPENING),
                chosen_ids=chosen, rejected_ids=rejected, trigger_id="wait-harm", chosen_harm=0.0, rejected_harm=1.0,
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def trained(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One stage, trained without interruption."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    train(str(small_model), pairs, out, SMALL, reader, LIMITS)
    return out


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False
