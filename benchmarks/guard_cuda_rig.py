"""A large model with random weights that says a given text, under Model Runner V2 (`benchmarks.guard_cuda`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from benchmarks.guard_rig import MAX_LEN, SAID


class ScriptedText(LogitsProcessor):  # type: ignore[misc]  # vLLM is not followed
    """Makes every row say `text`, from `extra_args["script"]` and its own position on; decided on the device."""

    text: ClassVar[list[int]] = []

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self._text = torch.tensor(self.text, device=req_states.device)
        self._starts = torch.zeros(req_states.max_num_reqs, dtype=torch.int64, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Notes where the row begins; True: every row is scripted."""
        self._starts[req_idx] = (sampling_params.extra_args or {}).get("script", 0)
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Writes one logit a row."""
        at = (self._starts[ctx.expanded_idx_mapping.long()] + ctx.pos) % len(self.text)
        return logits.scatter_(1, self._text[at][:, None], SAID)


def build_large_model(base: Path, target: Path, shape: Mapping[str, int]) -> Path:
    """Configuration and tokenizer alone, with the vocabulary of `base`: vLLM makes the weights up (`dummy`)."""
    vocabulary = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=MAX_LEN, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", **shape,
    )  # fmt: skip
    config.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, target / name)
    return target
