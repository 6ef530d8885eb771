"""Shared real parts: one tiny model and one in-process vLLM engine per test session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

if TYPE_CHECKING:
    from vllm import LLM

    from guard.traces import Trace


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the scripted tiny reasoning model (see tests/tiny.py)."""
    from tests.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@dataclass
class Engine:
    """The shared guarded engine: generate, and read what the guard wrote."""

    llm: LLM
    spool: Path

    def chat(self, requests: list[str], **params: Any) -> list[tuple[list[int], Trace | None]]:
        """Generates one reply per request in one batch; returns output ids and the trace of each."""
        from vllm import SamplingParams

        from guard.traces import read_traces

        ids = [f"test-{os.urandom(6).hex()}" for _ in requests]
        extra = params.pop("extra_args", {})
        sampling = [
            SamplingParams(**{"temperature": 0.0, "max_tokens": 80, **params}, extra_args={"guard_id": i, **extra})
            for i in ids
        ]
        tokenizer = self.llm.get_tokenizer()
        prompts = [
            {"prompt_token_ids": tokenizer.apply_chat_template(
                [{"role": "user", "content": r}], add_generation_prompt=True, return_dict=False)}
            for r in requests
        ]  # fmt: skip
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        traces = {t.guard_id: t for t in read_traces(self.spool)[0]}
        return [(list(o.outputs[0].token_ids), traces.get(i)) for o, i in zip(outputs, ids, strict=True)]


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One in-process vLLM on the tiny model, guarded by the packaged detector and the default policy."""
    from vllm import LLM

    from guard.engine.v1 import engine_arguments

    spool = tmp_path_factory.mktemp("spool")
    llm = LLM(
        str(tiny_model), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16, block_size=32,
        enable_prefix_caching=True, num_gpu_blocks_override=256, disable_log_stats=True,
        **engine_arguments({"spool": str(spool), "allow_off": True, "probe_secret": "s3cret"}),
    )  # fmt: skip
    yield Engine(llm, spool)


@pytest.fixture(scope="session")
def decode(tiny_model: Path) -> Callable[[list[int]], str]:
    """Token ids of the tiny model -> text, special tokens included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda ids: tokenizer.decode(ids)
