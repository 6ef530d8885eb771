from __future__ import annotations

import pytest

from guard.errors import UserError
from guard.policy import Policy
from guard.runtime import GuardRuntime, tokenizer_hash
from guard.zones import ZoneGrammar
from tests.guard import kit

MUTE = kit.byte_level(special=("<|im_end|>",))


def test_a_runtime_joins_policy_detector_and_tokenizer() -> None:
    runtime = kit.runtime(Policy(triggers=("victim", "danger")))
    assert (runtime.grammar.marks, runtime.threshold, runtime.model) == ({3, 4}, 0.5, "kit")
    assert [t.id for t in runtime.triggers] == ["victim", "danger"]
    assert runtime.table.bytes_of[kit.encode(" agree")[0]] == b" agree"


@pytest.mark.parametrize(("threshold", "expected"), [(None, 0.5), (0.0, 0.0), (0.75, 0.75)])
def test_the_policys_threshold_goes_before_the_detectors(threshold: float | None, expected: float) -> None:
    assert kit.runtime(Policy(threshold=threshold)).threshold == expected


def test_a_model_that_marks_no_reasoning_needs_the_answer_zone() -> None:
    with pytest.raises(UserError, match=r"Model mute marks no reasoning.*zones: \[reasoning, answer\]"):
        GuardRuntime.build(Policy(), kit.WordDetector(), MUTE, "mute")
    runtime = GuardRuntime.build(Policy(zones=("answer",)), kit.WordDetector(), MUTE, "mute")
    assert runtime.grammar == ZoneGrammar("answer")


def test_an_unknown_trigger_is_named() -> None:
    with pytest.raises(UserError, match="got nobody"):
        GuardRuntime.build(Policy(triggers=("nobody",)), kit.WordDetector(), kit.tokenizer(), "kit")


def test_the_tokenizer_hash_tells_tokenizers_apart() -> None:
    assert kit.runtime().tokenizer_hash == tokenizer_hash(kit.byte_level())
    assert len({tokenizer_hash(t) for t in (kit.tokenizer(), MUTE, kit.metaspace())}) == 3
    assert len(tokenizer_hash(MUTE)) == 12


def test_the_tokenizer_hash_is_that_of_the_file_whatever_transformers_adds() -> None:
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast(tokenizer_object=kit.byte_level()).backend_tokenizer
    framed = kit.byte_level()
    framed.enable_truncation(12)
    framed.enable_padding()
    assert {tokenizer_hash(t) for t in (loaded, framed)} == {tokenizer_hash(kit.byte_level())}
