"""Which parser vLLM is started with, and that vLLM's Harmony parts read what the guard reads and forces."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from guard.errors import UserError
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.runtime import GuardRuntime
from guard.sidecar.model import ServedModel
from guard.sidecar.parser import needs_special_text, reasoning_parser
from guard.triggers import REFUSAL, STOPPING
from tests import harmony
from tests.guard import channels, kit


def served(tokenizer: Tokenizer, kind: str | None = "llama") -> ServedModel:
    return ServedModel("here", "m", tokenizer, 512, None, kind)


def test_think_tags_and_no_tags() -> None:
    assert reasoning_parser(served(kit.tokenizer())) == "deepseek_r1"
    assert needs_special_text(served(kit.tokenizer()))
    qwen = served(kit.byte_level((), ("<|im_end|>",), ("<think>", "</think>")))
    assert (reasoning_parser(qwen), needs_special_text(qwen)) == ("deepseek_r1", False)
    bare = served(kit.byte_level((), ("<|im_end|>",)))
    assert (reasoning_parser(bare), needs_special_text(bare)) == (None, False)


def test_gpt_oss_is_read_by_its_ids() -> None:
    model = served(harmony.tokenizer(), "gpt_oss")
    assert (reasoning_parser(model), needs_special_text(model)) == ("openai_gptoss", False)


def test_channels_that_vllm_would_not_take_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"only for models of type gpt_oss; got llama\. Its tokens can be guarded"):
        reasoning_parser(served(channels.tokenizer()))


def _moved(token: str) -> Tokenizer:
    """gpt-oss's tokenizer in which two ids have changed places."""
    spec: dict[str, Any] = json.loads(harmony.tokenizer().to_str())
    vocab = spec["model"]["vocab"]
    for name in (token, "<|reserved_200000|>"):
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != name]
    vocab[token], vocab["<|reserved_200000|>"] = vocab["<|reserved_200000|>"], vocab[token]
    made: Tokenizer = Tokenizer.from_str(json.dumps(spec))
    return made


@pytest.mark.parametrize("token", ["<|end|>", "I", "Ġhelp"])
def test_a_model_of_its_type_with_another_vocabulary_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="another vocabulary than the Harmony library"):
        reasoning_parser(served(_moved(token), "gpt_oss"))
    with pytest.raises(UserError, match="another vocabulary than the Harmony library"):
        reasoning_parser(served(channels.tokenizer(), "gpt_oss"))


@functools.cache
def runtime(policy: Policy) -> GuardRuntime:
    return GuardRuntime.build(policy, kit.WordDetector(), harmony.tokenizer(), "gpt-oss", harmony.SPECIAL["<|return|>"])


@functools.cache
def chat() -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=harmony.tokenizer(), eos_token="<|return|>")
    fast.chat_template = channels.TEMPLATE
    return fast


def test_the_request_is_found_in_prompts_that_vllm_builds_without_the_template() -> None:
    run = runtime(Policy())
    reader = PromptReader.build(chat(), run.table, run.grammar)
    for prompt, request in zip(harmony.prompts(), [harmony.QUESTION] * 3 + ["Is it cold?"], strict=True):
        assert reader.request(prompt) == request
        zones = reader.zones(prompt)
        assert (zones.state, zones.path("answer")) == ("header", tuple(harmony.ids("<|channel|>final<|message|>")))


MODEL = f"<|channel|>analysis<|message|>{kit.CALM} {kit.CUE}<|end|>{channels.FINAL}My reply ends here.<|return|>"


@pytest.mark.parametrize(("rung", "answer"), [("trigger", "My reply ends here."), ("refuse", REFUSAL)])
def test_vllm_takes_a_guarded_reply_apart_as_the_guard_does(rung: str, answer: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    run = runtime(Policy(threshold=0.5, triggers=("victim",), ladder=(rung,)))  # type: ignore[arg-type]
    reader = PromptReader.build(chat(), run.table, run.grammar)
    watcher = StepMonitor(run, "car", zones=reader.zones(harmony.prompts()[0]))
    output = kit.generate(watcher, harmony.ids(MODEL))
    if rung == "refuse":
        output = output[: output.index(harmony.SPECIAL["<|return|>"]) + 1]
    said = run.triggers[0].text if rung == "trigger" else STOPPING
    reasoning = f"{kit.CALM} {kit.CUE} {said}"
    parser = ParserManager.get_parser(reasoning_parser_name="openai_gptoss", is_harmony=True)
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "car"}])
    assert parser(chat()).parse("", request, model_output_token_ids=output) == (reasoning, answer, None)
    stream, found = parser(chat()), {"reasoning": "", "content": ""}
    for index, token in enumerate(output):
        delta = stream.parse_delta("", [token], request, finished=index == len(output) - 1)
        for name in found:
            found[name] += (getattr(delta, name) or "") if delta is not None else ""
    assert found == {"reasoning": reasoning, "content": answer}


def test_the_test_tokenizer_has_gpt_osss_ids() -> None:
    text = channels.FINAL + "I am sorry.<|return|>"
    assert harmony.tokenizer().encode(text, add_special_tokens=False).ids == harmony.ids(text)
