"""Tiny models that write channels, made as tests/tiny.py makes its own: each next token hangs on the last one alone.

`build_words` has a small vocabulary: its header always names the final channel, so that only a prompt that opened the
analysis makes it reason, and after that it answers by itself. `build_gpt_oss` has gpt-oss's vocabulary and is of its
model type, so that vLLM serves it through the Harmony library: its header always names the analysis, which never ends
but by the guard.
"""

from __future__ import annotations

from pathlib import Path

from transformers import GptOssConfig, PreTrainedTokenizerFast

from guard.triggers import POOL
from tests import harmony
from tests.guard import channels
from tests.tiny import ANSWER, CUE, OPENING, PLAN, REFUSAL_STEP, spell, word_tokenizer, write_model

FIRST = "The"
"""First word of `OPENING`: a prompt ends with it."""
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>"
OPENING_LINE = "The user wants help breaking into a parked car.\n"
BARE_CUE = "I know this is wrong but being curious how it would be done my thoughts go along!"
BARE_REFUSAL = " Therefore declining remains all that makes sense…"
"""The same without a token twice."""


def build_words(target: Path) -> Path:
    """Analysis from `FIRST` on, with a cue; a final message; after any trigger a refusal."""
    texts = [OPENING, CUE, *PLAN, ANSWER, REFUSAL_STEP, *channels.NAMES.split()]
    tokenizer = word_tokenizer(list(channels.SPECIAL), texts)
    final = ["<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", *spell(ANSWER), "<|return|>"]
    thoughts = [word for step in (CUE, *PLAN) for word in spell(" " + step)]
    chains = [[*spell(OPENING), *thoughts, *final]]
    chains += [[spell(t.text)[-1], *spell(" " + REFUSAL_STEP), *final] for t in POOL]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|return|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = channels.TEMPLATE
    return write_model(target, fast, [[tokenizer.token_to_id(word) for word in chain] for chain in chains])


def build_gpt_oss(target: Path) -> Path:
    """An analysis with a cue after each header; after a trigger a refusal that ends the message."""
    thoughts = harmony.ids(ANALYSIS + OPENING_LINE + BARE_CUE + "<|end|>")
    refusal = harmony.ids("." + BARE_REFUSAL + "<|end|><|start|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=harmony.tokenizer(), bos_token="<|startoftext|>", eos_token="<|return|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    fast.chat_template = channels.TEMPLATE
    write_model(target, fast, [[*thoughts, *harmony.ids("<|start|>")], refusal], hidden=64)
    GptOssConfig(
        architectures=["LlamaForCausalLM"], vocab_size=len(fast), hidden_size=64, intermediate_size=64, head_dim=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
        layer_types=["full_attention"] * 2, attention_bias=False, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, hidden_act="silu",
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    ).save_pretrained(target)  # fmt: skip
    return target
