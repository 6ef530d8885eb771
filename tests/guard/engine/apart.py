"""A guarded engine in a process of its own: prints its replies to the given requests as JSON.

python -m tests.guard.engine.apart MODEL SPOOL ENGINE_ARGUMENTS MAX_TOKENS REQUEST...
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ASYNC = "async_scheduling"


def replies(
    model: Path, spool: Path, requests: list[str], arguments: dict[str, Any], *, max_tokens: int = 80
) -> list[list[int]]:
    """Greedy replies in ids; request n has the guard id `r<n>`."""
    command = [sys.executable, "-m", "tests.guard.engine.apart", str(model), str(spool), json.dumps(arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if ASYNC in arguments else "1"
    ran = subprocess.run(
        [*command, str(max_tokens), *requests], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("REPLIES ")] or [ran.stderr[-3000:]]
    found: list[list[int]] = json.loads(line.removeprefix("REPLIES "))
    return found


def main(model: str, spool: str, arguments: str, max_tokens: str, *requests: str) -> None:
    """Greedy replies of one engine."""
    from vllm import LLM, SamplingParams

    from guard.engine.adapter import engine_arguments
    from guard.engine.history import REST_SECONDS

    wanted = json.loads(arguments)
    if wanted.get(ASYNC):
        allow_async_scheduling()
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, block_size=32,
        disable_log_stats=True, **wanted, **engine_arguments({"spool": spool, "allow_off": True}),
    )  # fmt: skip
    if ASYNC in wanted:
        assert type(llm.llm_engine.engine_core.engine_core.scheduler).__name__ == "AsyncScheduler"
    template = llm.get_tokenizer().apply_chat_template
    prompts = [
        template([{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False)
        for request in requests
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=int(max_tokens), extra_args={"guard_id": f"r{i}"})
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    off = SamplingParams(max_tokens=1, extra_args={"guard_off": True})
    llm.generate([{"prompt_token_ids": [1]}], off, use_tqdm=False)
    time.sleep(2 * REST_SECONDS)  # runner V2's adapter writes once the engine rests
    sys.stdout.write("REPLIES " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")


def allow_async_scheduling() -> None:
    """vLLM's CPU platform switches it off; the runner's code for it needs CUDA's streams and events by name only."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config.__func__

    def check(cls: type, vllm_config: Any) -> None:
        checked(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check)
    for name in ("Event", "Stream"):
        setattr(torch.cuda, name, _Nothing)
    torch.cuda.current_stream = _Nothing
    torch.cuda.stream = lambda _: contextlib.nullcontext()


class _Nothing:
    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: object) -> None: ...


if __name__ == "__main__":
    main(*sys.argv[1:])
