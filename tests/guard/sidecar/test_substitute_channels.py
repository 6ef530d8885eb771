"""Mode `substitute` on a channel format: what is taken back, where the trigger stands, what the client reads."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.sidecar.speech import Speech
from guard.sidecar.substitute import Substitution
from guard.triggers import REFUSAL, STOPPING
from tests.guard import channels, kit
from tests.guard.channels import FINAL, RETURN, encode, runtime
from tests.guard.sidecar.test_substitute import PROMPT, Model

OPEN, HEADING, CUE = "<|start|>assistant", "<|channel|>analysis<|message|>", " " + kit.CUE
SUBSTITUTE = Policy(mode="substitute", triggers=("victim",))
REFUSE = SUBSTITUTE.model_copy(update={"ladder": ("refuse",)})
(VICTIM,) = runtime(SUBSTITUTE).triggers
END = f"<|end|>{FINAL}My reply ends here.<|return|>"


def run(model: Model, policy: Policy = SUBSTITUTE, limit: int = 300) -> Substitution:
    """The finished substitution; PROMPT's ids stand for the prompt, which ended in `OPEN`."""
    watcher = StepMonitor(
        runtime(policy), "car", zones=channels.reader(OPEN), guard_id="kit", mode="substitute"
    )  # fmt: skip

    async def score(watched: StepMonitor) -> float:
        assert watched.pending is not None
        return kit.score(watched.pending.text)

    async def all_of() -> list[list[int]]:
        return [ids async for ids in found.released()]

    found = Substitution(watcher, PROMPT, limit, RETURN, model.go_on, score)
    assert [token for ids in asyncio.run(all_of()) for token in ids] == found.output
    return found


def spelled(found: Substitution) -> str:
    text: str = channels.tokenizer().decode(found.output, skip_special_tokens=False)
    return text


@pytest.mark.parametrize(
    ("first", "then", "policy", "wanted"),
    [(f"{HEADING}{kit.CALM}{CUE}{CUE}{END}", END, SUBSTITUTE, f"{HEADING}{kit.CALM} {VICTIM.text}{END}"),
     (f"{HEADING}{kit.CUE}{END}", END, SUBSTITUTE, f"{HEADING}{VICTIM.text}{END}"),
     (f"{HEADING}{kit.CALM}{CUE[:-1]}{END}", END, SUBSTITUTE, f"{HEADING}{kit.CALM} {VICTIM.text}{END}"),
     (f"{HEADING}{kit.CALM}{CUE}{END}", "", REFUSE,
      f"{HEADING}{kit.CALM} {STOPPING}<|end|>{FINAL}{REFUSAL}<|return|>"),
     (f"<|channel|>final<|message|>My reply ends here.<|end|>{CUE}", END, SUBSTITUTE,
      f"<|channel|>final<|message|>My reply ends here.<|end|>{channels.ANALYSIS}{VICTIM.text}{END}"),
     (kit.CUE * 5, END, SUBSTITUTE, f"{HEADING}{VICTIM.text}{END}"),
     (kit.CUE * 5, "", REFUSE, f"<|channel|>final<|message|>{REFUSAL}<|return|>")],
)  # fmt: skip
def test_a_trigger_stands_where_the_cue_began(first: str, then: str, policy: Policy, wanted: str) -> None:
    turned = len(encode(VICTIM.text)) + 1
    found = run(Model(lambda output: encode(then if len(output) >= turned else first)), policy)
    assert spelled(found) == wanted
    assert not any(step.cue for step in found.monitor.steps)
    (item,) = found.monitor.receipt.interventions
    assert (item.mode, item.completed) == ("substitute", True)


PARTS = st.lists(
    st.sampled_from(
        [channels.ANALYSIS, FINAL, HEADING, "<|end|>", "<|start|>", "<|message|>", kit.CALM, CUE, CUE[:-1],
         kit.CALM * 6, "<|return|>", "\n"]
    ),
    max_size=10,
).map(lambda parts: encode("".join(parts)) or [RETURN])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PARTS, st.integers(1, 9), st.integers(1, 120))
def test_any_pieces_give_the_same_and_no_cue_gets_out(script: list[int], size: int, limit: int) -> None:
    policy = Policy(mode="substitute")
    one = run(Model(lambda output: script, size=1), policy, limit)
    other = run(Model(lambda output: script, size=size), policy, limit)
    assert (one.output, one.monitor.steps, one.monitor.receipt) == (
        other.output, other.monitor.steps, other.monitor.receipt,
    )  # fmt: skip
    if len(one.monitor.receipt.interventions) < len(policy.ladder):
        assert not any(step.cue for step in one.monitor.steps)


def test_speech_says_the_final_channel_as_content() -> None:
    speech = Speech(runtime().table, channels.reader(OPEN))
    parts = speech.say(encode(f"{HEADING}so{END}"), last=True)
    assert parts == [("reasoning", "so"), ("content", "My reply ends here.")]
