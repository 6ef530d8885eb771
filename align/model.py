"""The model that is aligned, as far as its tokenizer goes: ids of a request, and the guard's rules for its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from classifiers.detector import Detector
from guard.errors import UserError
from guard.policy import load_policy
from guard.runtime import GuardRuntime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; an unknown model is a UserError."""
    from transformers import AutoTokenizer

    path = Path(model)
    if model.startswith((".", "/")) and not (path / "config.json").exists():
        raise UserError(f"Model {model} was not found", wanted="a directory with config.json, or a hub name")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"Model {model} cannot be loaded", got=str(error).split("\n")[0]) from error


def load_runtime(
    model: str, tokenizer: PreTrainedTokenizerBase, policy: Path | None, detector: Path | None
) -> GuardRuntime:
    """The guard's policy and detector on this model's tokens; UserError for a model that writes channels."""
    runtime = GuardRuntime.build(
        load_policy(policy), Detector.load(detector), tokenizer.backend_tokenizer, model, tokenizer.eos_token_id
    )
    if runtime.grammar.channel is not None:
        raise UserError(
            f"{model} writes channels", wanted="a model that thinks between two marks: others are guarded only"
        )
    return runtime


def render(tokenizer: PreTrainedTokenizerBase, request: str) -> list[int]:
    """A request as the model's chat template renders it."""
    return render_chat(tokenizer, [{"role": "user", "content": request}])


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the model's chat template renders it, up to where the model goes on."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(i) for i in ids]
