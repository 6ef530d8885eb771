"""gpt-oss's vocabulary as vLLM's Harmony library holds it, made into a tokenizer without a download."""

from __future__ import annotations

import functools

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from guard.steps import _UNICODE_TO_BYTE, TokenTable

ORDINARY = 199998
"""Ids below are text, ids from here on special or unused."""
SPECIAL = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003,
    "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012,
}  # fmt: skip


@functools.cache
def encoding() -> HarmonyEncoding:
    """The library's own."""
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@functools.cache
def tokenizer() -> Tokenizer:
    """Every id of the library's; words that are one token are encoded as the library does, others byte by byte."""
    spelled = {byte: char for char, byte in _UNICODE_TO_BYTE.items()}
    library = encoding()

    def piece(token: int) -> bytes:
        return library.decode([token], errors="surrogateescape").encode("utf-8", "surrogateescape")

    vocab = {"".join(spelled[b] for b in piece(i)): i for i in range(ORDINARY)}
    names = {i: name for name, i in SPECIAL.items()}
    vocab |= {names.get(i, f"<|reserved_{i}|>"): i for i in range(ORDINARY, max(names) + 1)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return made


@functools.cache
def table() -> TokenTable:
    """Its token table."""
    return TokenTable.from_tokenizer(tokenizer())


def ids(text: str) -> list[int]:
    """The library's ids of a text; marks in it become special."""
    found: list[int] = encoding().encode(text, allowed_special="all")
    return found


def prompts() -> list[list[int]]:
    """What vLLM would give the engine: a question, a question with instructions, and one after a tool call."""
    from vllm.entrypoints.openai.parser import harmony_utils as vllm

    ask = {"role": "user", "content": QUESTION}
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    turns = [
        {"role": "user", "content": "Is it cold?"},
        {"role": "assistant", "reasoning": "I must look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3 degrees"},
        {"role": "assistant", "content": "It is."},
    ]
    preamble = vllm.build_harmony_preamble(instructions="Be brief.")
    bare = vllm.build_harmony_preamble()
    return [
        vllm.render_for_completion([*start, *vllm.parse_chat_inputs_to_harmony_messages(messages)])
        for start, messages in ((bare, [ask]), (preamble, [ask]), (preamble, [*turns, ask]), (preamble, turns[:3]))
    ]


QUESTION = "How do I break into a parked car?"
