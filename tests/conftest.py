"""Shared real parts: one tiny model and one in-process vLLM engine per test session."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers on two cores: with a thread for each core in both, they would wait for one another and spin.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from guard.engine.session import EngineGuard
    from guard.engine.v1 import GuardV1
    from guard.engine.v2 import GuardV2
    from guard.traces import Trace

# The machine may be busy: slowness is no failure. Where `CI` is set hypothesis runs the same cases every time,
# elsewhere a failure prints what runs it again.
settings.register_profile("reasonguard", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reasonguard")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the scripted tiny reasoning model (see tests/tiny.py)."""
    from tests.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@dataclass(frozen=True)
class Reply:
    """One row's output ids, why it ended, and the trace that the guard wrote (None: unguarded)."""

    ids: list[int]
    finish: str | None
    trace: Trace | None


@dataclass
class Engine:
    """The shared guarded engine: generate, and read what the guard wrote."""

    llm: LLM
    spool: Path

    def chat(self, requests: list[str], **params: Any) -> list[tuple[list[int], Trace | None]]:
        """Generates one reply per request in one batch; returns output ids and the trace of each."""
        return [(reply.ids, reply.trace) for reply in self.run([(request, params) for request in requests])]

    def run(self, rows: list[tuple[str, dict[str, Any]]]) -> list[Reply]:
        """The same with sampling parameters per row."""
        sampling = [self.sampling(**params) for _, params in rows]
        prompts = [{"prompt_token_ids": self.prompt(request)} for request, _ in rows]
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        traces = self.traces()
        return [
            Reply(list(o.outputs[0].token_ids), o.outputs[0].finish_reason, traces.get(s.extra_args["guard_id"]))
            for o, s in zip(outputs, sampling, strict=True)
        ]

    def sampling(self, **params: Any) -> SamplingParams:
        """Greedy, at most 80 tokens, with a guard id of its own, unless `params` say otherwise."""
        from vllm import SamplingParams

        extra = {"guard_id": f"test-{os.urandom(6).hex()}", **params.pop("extra_args", {})}
        return SamplingParams(**{"temperature": 0.0, "max_tokens": 80, **params}, extra_args=extra)

    def prompt(self, request: str) -> list[int]:
        """The request as the model's chat template renders it, in ids."""
        ids: list[int] = self.llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False
        )
        return ids

    def traces(self) -> dict[str, Trace]:
        """What the guard wrote so far, by guard id."""
        from guard.traces import read_traces

        self.flush()
        return {trace.guard_id: trace for trace in read_traces(self.spool)[0]}

    def flush(self) -> None:
        """Waits until what has ended is written: runner V1 removes a row when it schedules another step, so one
        unguarded token makes it do so; runner V2's adapter notices that the engine rests."""
        self.llm.generate(
            [{"prompt_token_ids": [1]}], self.sampling(max_tokens=1, extra_args={"guard_off": True}), use_tqdm=False
        )
        adapter: Any = self.processor
        for _ in range(200):
            slots = [*getattr(adapter, "_slots", {}).values(), *(slot for slot, _ in getattr(adapter, "_left", []))]
            if all(slot.written or (slot.row is None and slot.start is None) for slot in slots):
                return
            time.sleep(0.02)
        raise TimeoutError("the guard did not notice in 4 s that the engine rests")

    @property
    def processor(self) -> GuardV1 | GuardV2:
        """The guard that the engine loaded: V1 on CPUs, V2 on GPUs (docs/engines.md)."""
        from guard.engine.v1 import GuardV1
        from guard.engine.v2 import GuardV2

        runner = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        v2 = hasattr(runner, "sampler") and hasattr(runner.sampler, "logits_processors")
        loaded = runner.sampler.logits_processors if v2 else runner.input_batch.logitsprocs.all
        (found,) = (p for p in loaded if isinstance(p, (GuardV1, GuardV2)))
        return found

    @property
    def guard(self) -> EngineGuard:
        """What the loaded adapter asks."""
        return self.processor._guard


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One in-process vLLM on the tiny model, guarded by the packaged detector and the default policy."""
    import torch
    from vllm import LLM

    from guard.engine.adapter import engine_arguments

    # On a busy machine a second thread only waits for the first. vLLM takes `set_num_threads` away.
    set_num_threads, count = torch.set_num_threads, torch.get_num_threads()
    set_num_threads(1)
    spool = tmp_path_factory.mktemp("spool")
    llm = LLM(
        str(tiny_model), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16, block_size=32,
        enable_prefix_caching=True, num_gpu_blocks_override=256, disable_log_stats=True, async_scheduling=False,
        **engine_arguments({"spool": str(spool), "allow_off": True, "secret": "s3cret"}),
    )  # fmt: skip
    yield Engine(llm, spool)
    torch.set_num_threads = set_num_threads
    set_num_threads(count)


@pytest.fixture(scope="session")
def decode(tiny_model: Path) -> Callable[[list[int]], str]:
    """Token ids of the tiny model -> text, special tokens included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda ids: tokenizer.decode(ids)
