"""How vLLM takes reasoning and answer apart in its responses: the parser that `serve` starts it with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guard.errors import UserError
from guard.triggers import REFUSAL
from guard.zones import find_grammar

if TYPE_CHECKING:
    from guard.sidecar.model import ServedModel

_HARMONY = "gpt_oss"
"""The model type for which vLLM builds prompts and reads outputs with its Harmony library."""


def reasoning_parser(model: ServedModel) -> str | None:
    """vLLM's parser for a model; None where it has none for the model's marks.

    A channel format that vLLM would not take apart, or would write with other ids than the model's, is a UserError.
    """
    if find_grammar(model.tokenizer).channel is None:
        return "deepseek_r1" if model.tokenizer.token_to_id("<think>") is not None else None
    if model.kind != _HARMONY:
        raise UserError(
            f"Model {model.name} writes channels, and vLLM takes them apart only for models of type {_HARMONY}",
            got=model.kind,
            fix="Its tokens can be guarded, its responses cannot be told apart: use the engine without `serve`",
        )
    _check_vocabulary(model)
    return "openai_gptoss"


def needs_special_text(model: ServedModel) -> bool:
    """Whether the parser looks for the marks in the text and not in the ids, and would not be shown them."""
    grammar, added = find_grammar(model.tokenizer), model.tokenizer.get_added_tokens_decoder()
    return grammar.channel is None and any(token in added and added[token].special for token in grammar.marks)


def _check_vocabulary(model: ServedModel) -> None:
    """UserError unless the library's vocabulary is the model's: the guard would not see the prompt that vLLM builds."""
    try:
        from openai_harmony import HarmonyEncodingName, load_harmony_encoding
    except ImportError as error:
        raise UserError(
            "vLLM's Harmony library is not installed", wanted="the package oss-harmony",
            fix="Install the extra `cpu` or `gpu`",
        ) from error  # fmt: skip
    library, tokenizer = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS), model.tokenizer
    special = sorted(find_grammar(tokenizer).special)
    forced = tokenizer.encode(REFUSAL, add_special_tokens=False).ids
    try:
        same = library.decode(forced) == REFUSAL and all(
            library.encode(tokenizer.id_to_token(token), allowed_special="all") == [token] for token in special
        )
    except ValueError:
        same = False
    if not same:
        raise UserError(
            f"Model {model.name} has another vocabulary than the Harmony library with which vLLM builds its prompts",
            wanted="gpt-oss's own tokenizer",
        )
