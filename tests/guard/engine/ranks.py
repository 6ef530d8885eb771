"""A guarded engine of its own for `test_ranks`: prints the replies to the given requests as JSON.

python -m tests.guard.engine.ranks MODEL SPOOL RANKS REQUEST...
"""

from __future__ import annotations

import json
import sys


def main(model: str, spool: str, ranks: str, *requests: str) -> None:
    """Greedy replies of one engine with so many tensor-parallel ranks."""
    from vllm import LLM, SamplingParams

    from guard.engine.adapter import engine_arguments

    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, block_size=32,
        tensor_parallel_size=int(ranks), disable_log_stats=True,
        **engine_arguments({"spool": spool, "allow_off": True}),
    )  # fmt: skip
    template = llm.get_tokenizer().apply_chat_template
    prompts = [
        template([{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False)
        for request in requests
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=80, extra_args={"guard_id": f"r{i}"}) for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    off = SamplingParams(max_tokens=1, extra_args={"guard_off": True})
    llm.generate([{"prompt_token_ids": [1]}], off, use_tqdm=False)
    sys.stdout.write("REPLIES " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
