"""The engine's side of `align.generate`: says `ready`, reads orders from stdin, one a line, and answers each by `done`.

Requests are fed as others finish, so that the batch stays full; only the end of an order runs with a small one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from align.generate import EngineSpec, Job, Order, Result, end_torn_line


def main(spec: EngineSpec, log: Path) -> None:
    """Serves orders until stdin ends. What vLLM prints goes to `log`; stdout is kept for answers."""
    answers = os.fdopen(os.dup(1), "w")
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
    llm, console = start_engine(spec), Console(stderr=True)
    loaded = spec.model
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = Order.model_validate_json(line)
        if order.model != loaded:
            exchange(llm, order.model)
            loaded = order.model
        _fill(llm, order, console, guarded=spec.guard is not None)
        print("done", file=answers, flush=True)
    # All results are written; an engine takes seconds to tear down.
    os._exit(0)


def start_engine(spec: EngineSpec) -> Any:
    """The engine, in this process."""
    from vllm import LLM

    from guard.engine.adapter import engine_arguments
    from guard.engine.hardware import fast_dtype

    guard = engine_arguments({**spec.guard, "allow_off": True}) if spec.guard is not None else {}
    return LLM(
        spec.model, dtype=fast_dtype(), enforce_eager=True, max_model_len=spec.max_model_len, seed=spec.seed,
        max_num_seqs=spec.max_num_seqs, block_size=32, enable_prefix_caching=True, disable_log_stats=True,
        use_tqdm_on_load=False, **guard,
    )  # fmt: skip


def exchange(llm: Any, model: str) -> None:
    """Loads another model's weights into the running engine; what was cached under the old ones is dropped."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache still holds blocks of the old weights")


def sample(llm: Any, jobs: Sequence[Job], *, guarded: bool) -> Iterator[Result]:
    """Results as they become whole."""
    engine = llm.llm_engine
    room = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    waiting, keys = iter(jobs), {job.id: job.key for job in jobs}
    while True:
        while engine.get_num_unfinished_requests() < room and (job := next(waiting, None)) is not None:
            engine.add_request(job.id, {"prompt_token_ids": job.prompt_ids}, _params(job, guarded=guarded))
        if not engine.has_unfinished_requests():
            return
        for output in engine.step():
            if output.finished:
                reply = output.outputs[0]
                yield Result(
                    id=output.request_id, job=keys[output.request_id], output_ids=list(reply.token_ids),
                    finish=reply.finish_reason,
                )  # fmt: skip


def _params(job: Job, *, guarded: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=job.temperature, top_k=job.top_k, max_tokens=job.max_tokens, stop_token_ids=job.stop_ids,
        output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False,
        extra_args={"guard_id": job.guard_id, "guard_off": not job.guard} if guarded else None,
    )  # fmt: skip


def _fill(llm: Any, order: Order, console: Console, *, guarded: bool) -> None:
    jobs = [Job.model_validate_json(line) for line in order.jobs.read_text(encoding="utf-8").splitlines()]
    end_torn_line(order.out)
    with Progress(console=console) as bar, order.out.open("a", encoding="utf-8") as sink:
        task = bar.add_task(order.what, total=len(jobs))
        for result in sample(llm, jobs, guarded=guarded):
            sink.write(result.model_dump_json() + "\n")
            sink.flush()
            bar.advance(task)
    if guarded:
        # The last requests' traces are written when their rows leave the batch: one more step clears it.
        list(sample(llm, [Job(id="flush", prompt_ids=jobs[-1].prompt_ids, max_tokens=1)], guarded=True))


if __name__ == "__main__":
    main(EngineSpec.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]))
