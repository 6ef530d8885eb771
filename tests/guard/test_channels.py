"""The monitor on a channel format: where cues are answered, what the ladder forces, and that a replay is equal."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from guard.engine import rows
from guard.engine.session import EngineGuard
from guard.engine.settings import EngineSettings
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.replay import Replayer
from guard.replay_report import compare
from guard.runtime import GuardRuntime
from guard.traces import StepRecord, Trace
from guard.triggers import REFUSAL, STOPPING
from tests.guard import channels, kit
from tests.guard.channels import ANALYSIS, CALL, END, FINAL, RETURN, encode, letters, runtime

ONE = Policy(threshold=0.5, triggers=("victim",))
BOTH = ONE.model_copy(update={"zones": ("reasoning", "answer")})
REFUSE = ONE.model_copy(update={"ladder": ("refuse",)})
(VICTIM,) = runtime(ONE).triggers
OPEN, HEADING = "<|start|>assistant", "<|channel|>analysis<|message|>"
CUE = " " + kit.CUE


def written(text: str, policy: Policy = ONE, *, prompt: str = OPEN) -> tuple[list[int], StepMonitor]:
    """What comes of a model that says a text: output ids and the finished monitor."""
    watcher = channels.monitor(policy, prompt=prompt)
    return kit.generate(watcher, encode(text)), watcher


def spelled(ids: list[int]) -> str:
    """Ids as text, marks included."""
    found: str = channels.tokenizer().decode(ids, skip_special_tokens=False)
    return found


def test_a_cue_in_the_analysis_is_answered_there() -> None:
    once = ONE.model_copy(update={"ladder": ("trigger",)})
    output, watcher = written(f"{HEADING}{kit.CALM}{CUE}{CUE}<|end|>{FINAL}My reply ends here.<|return|>", once)
    before, after = encode(HEADING + kit.CALM + CUE), encode(f"{CUE}<|end|>{FINAL}My reply ends here.<|return|>")
    trigger = list(VICTIM.spaced)
    assert output == before + trigger + after
    at, end = len(before), len(before) + len(trigger)
    assert watcher.steps == [
        StepRecord(start=3, end=10, zone="reasoning", score=0.125, cue=False),
        StepRecord(start=10, end=at, zone="reasoning", score=0.875, cue=True),
        StepRecord(start=at, end=end, zone="reasoning", score=None, cue=False, injected=True),
        StepRecord(start=end, end=end + 8, zone="reasoning", score=0.875, cue=True),
    ]
    assert (watcher.receipt.seen, watcher.receipt.injected_tokens) == (3, len(trigger))


def test_the_answer_is_watched_where_the_policy_says_so() -> None:
    text = f"{HEADING}{kit.CALM}<|end|>{FINAL}{kit.CALM}{CUE}<|return|>"
    assert len(written(text)[1].steps) == 1
    output, watcher = written(text, BOTH)
    assert [(step.zone, step.cue) for step in watcher.steps] == [
        ("reasoning", False), ("answer", False), ("answer", True), ("answer", False),
    ]  # fmt: skip
    assert output[-len(VICTIM.spaced) - 1 :] == [*VICTIM.spaced, RETURN]


@pytest.mark.parametrize(
    "channel",
    ["analysis", "commentary", "commentary to=functions.x <|constrain|>json", "unknown", "Final", "final json"],
)
def test_every_channel_but_the_final_one_is_watched(channel: str) -> None:
    output, watcher = written(f"<|channel|>{channel}<|message|>{kit.CALM}{CUE}")
    assert [step.cue for step in watcher.steps] == [False, True, False]
    assert output[-len(VICTIM.spaced) :] == list(VICTIM.spaced)


def test_a_step_that_the_messages_end_closes_is_answered_in_a_new_message() -> None:
    unfinished = kit.CUE.removesuffix(".")
    output, watcher = written(f"{HEADING}{unfinished}<|end|>{FINAL}My reply ends here.<|return|>")
    assert spelled(output) == (
        f"{HEADING}{unfinished}<|end|>{ANALYSIS}{VICTIM.text}{FINAL}My reply ends here.<|return|>"
    )
    assert output[len(encode(f"{HEADING}{unfinished}<|end|>{ANALYSIS}")) :][: len(VICTIM.opening)] == [*VICTIM.opening]
    assert VICTIM.opening == VICTIM.plain
    assert [i.completed for i in watcher.receipt.interventions] == [True]
    # The forced message has no end of its own: what the model says goes on in it.
    assert {step.zone for step in watcher.steps} == {"reasoning"}


def test_a_refusal_ends_the_analysis_and_opens_the_final_channel() -> None:
    output, watcher = written(f"{HEADING}{kit.CALM}{CUE}", REFUSE)
    assert spelled(output) == f"{HEADING}{kit.CALM}{CUE} {STOPPING}<|end|>{FINAL}{REFUSAL}<|return|>"
    (done,) = watcher.receipt.interventions
    assert (done.trigger_id, done.completed, done.forced) == ("refuse", True, len(output) - done.at)
    assert watcher.steps[-1].zone == "reasoning"


def test_a_refusal_after_the_messages_end_needs_no_last_sentence() -> None:
    unfinished = kit.CUE.removesuffix(".")
    output, _ = written(f"{HEADING}{unfinished}<|end|>", REFUSE)
    assert spelled(output) == f"{HEADING}{unfinished}<|end|>{FINAL}{REFUSAL}<|return|>"


def test_a_refusal_in_the_answer_ends_it() -> None:
    output, _ = written(f"<|channel|>final<|message|>{kit.CALM}{CUE}", REFUSE.model_copy(update={"zones": ("answer",)}))
    assert spelled(output) == f"<|channel|>final<|message|>{kit.CALM}{CUE} {REFUSAL}<|return|>"


def test_an_analysis_after_the_answer_is_watched_again() -> None:
    output, watcher = written(f"<|channel|>final<|message|>{kit.CALM}{CUE}<|end|>{ANALYSIS}{kit.CALM}{CUE}")
    assert [step.cue for step in watcher.steps] == [False, True, False]
    assert watcher.steps[0].start == len(encode(f"<|channel|>final<|message|>{kit.CALM}{CUE}<|end|>{ANALYSIS}"))
    assert output[-len(VICTIM.spaced) :] == list(VICTIM.spaced)


def test_text_without_a_header_is_watched_and_answered() -> None:
    # `hi` is no channel's: what a reply says before its header ends, vLLM may show.
    long = (kit.CALM + " ") * 5
    output, watcher = written(long + kit.CUE)
    assert watcher.steps[0] == StepRecord(start=0, end=35, zone="reasoning", score=0.125, cue=False)
    assert [step.cue for step in watcher.steps] == [False, True, False]
    assert output[-len(VICTIM.spaced) :] == list(VICTIM.spaced)
    output, watcher = written(long + kit.CUE, REFUSE)
    assert spelled(output).endswith(f"{STOPPING}<|message|><|end|>{FINAL}{REFUSAL}<|return|>")


def test_text_between_messages_is_watched_and_answered_in_a_message() -> None:
    output, watcher = written(f"<|channel|>final<|message|>My reply ends here.<|end|>{CUE}")
    assert spelled(output).endswith(f"<|end|>{CUE}{ANALYSIS}{VICTIM.text}")
    assert [step.cue for step in watcher.steps] == [True, False]
    output, _ = written(f"<|channel|>final<|message|>My reply ends here.<|end|>{CUE}", REFUSE)
    assert spelled(output).endswith(f"<|end|>{CUE}{FINAL}{REFUSAL}<|return|>")
    # A header that the model has opened is used.
    unfinished = CUE.removesuffix(".")
    output, _ = written(f"<|channel|>final<|message|>My reply ends here.<|end|>{unfinished}<|start|>", REFUSE)
    assert spelled(output).endswith(f"<|end|>{unfinished}{FINAL}{REFUSAL}<|return|>")


@pytest.mark.parametrize("cut", ["<|channel|>", "<|channel|>analysis", "<|channel|>analysis<|message|>"])
def test_a_reply_cut_in_its_header_has_no_cue(cut: str) -> None:
    output, watcher = written(cut)
    assert output == encode(cut)
    # vLLM shows an unfinished header's text as the answer: it is read like one.
    assert len(watcher.steps) == (cut == "<|channel|>analysis")
    assert watcher.receipt.interventions == []


def test_an_unfinished_header_is_judged_when_the_reply_ends() -> None:
    _, watcher = written(kit.CUE)
    assert watcher.steps == [StepRecord(start=0, end=8, zone="reasoning", score=0.875, cue=True)]
    assert watcher.receipt.interventions == []
    assert written(kit.CUE, ONE.model_copy(update={"zones": ("answer",)}))[1].steps == []


def test_marks_spelled_with_ordinary_tokens_leave_the_analysis_watched() -> None:
    spoof = letters(f"<|end|>{FINAL}")
    watcher = channels.monitor(ONE)
    output = kit.generate(watcher, [*encode(HEADING), *spoof, *encode(CUE)])
    assert output[-len(VICTIM.spaced) :] == list(VICTIM.spaced)
    assert [step.cue for step in watcher.steps] == [True, False]


@pytest.mark.parametrize("prompt", [OPEN + HEADING, OPEN + HEADING + kit.CALM, OPEN + "<|channel|>analysis"])
def test_a_prompt_that_opened_the_analysis_goes_on_in_it(prompt: str) -> None:
    rest = "<|message|>" if prompt.endswith("analysis") else ""
    output, watcher = written(f"{rest}{kit.CALM}{CUE}", prompt=prompt)
    assert [step.cue for step in watcher.steps] == [False, True, False]
    assert output == [*encode(f"{rest}{kit.CALM}{CUE}"), *VICTIM.spaced]


def test_a_prompt_that_opened_the_answer_is_left_alone() -> None:
    output, watcher = written(kit.CALM + CUE, prompt=FINAL)
    assert (output, watcher.steps) == (encode(kit.CALM + CUE), [])


def test_a_forced_header_that_is_outvoted_is_followed() -> None:
    watcher = channels.monitor(ONE)
    model = encode(f"{HEADING}{kit.CUE.removesuffix('.')}<|end|>{FINAL}My reply ends here.<|return|>")
    count = len(encode(f"{HEADING}{kit.CUE.removesuffix('.')}<|end|><|start|>assistant<|channel|>"))
    output = kit.generate(watcher, model, obey=lambda index: index < count)
    # Three ids were forced, then the model went on with its own header, which is now no header.
    assert output[:count] == model[: count - 3] + encode("<|start|>assistant<|channel|>")
    assert watcher.outvoted
    assert watcher.receipt.injected_tokens == 3
    assert watcher.receipt.enforcement_failed == 1


MODEL = st.lists(
    st.one_of(
        st.integers(-3, 500),
        st.sampled_from(range(8)),
        st.sampled_from(encode(kit.CALM + CUE + ".\n!") + encode(channels.NAMES)),
    ),
    max_size=150,
)  # fmt: skip
REPLIES = st.lists(
    st.sampled_from(
        [ANALYSIS, FINAL, HEADING, OPEN, "<|end|>", "<|start|>", "<|message|>", "<|channel|>final", kit.CALM, CUE,
         CUE.removesuffix("."), kit.CALM * 6, "<|return|>", "<|call|>", "\n", " final"]
    ),
    max_size=14,
).map(lambda parts: encode("".join(parts)))  # fmt: skip
POLICIES = st.builds(
    Policy, threshold=st.just(0.5), zones=st.sampled_from([("reasoning",), ("answer",), ("reasoning", "answer")]),
    shadow=st.booleans(), min_step_chars=st.sampled_from([1, 12]), max_step_tokens=st.sampled_from([8, 20, 96]),
    ladder=st.lists(st.sampled_from(["trigger", "strong", "refuse", "stop"]), max_size=6).map(tuple),
)  # fmt: skip
PROMPTS = st.sampled_from([OPEN, OPEN + HEADING, FINAL, "", "<|start|>user<|message|>car<|end|>" + OPEN])


def any_score(text: str) -> float | None:
    """A pure score that takes every kind of value."""
    return (0.9, 0.1, None, math.nan, 0.5, 7.0)[sum(text.encode()) % 6]


@settings(max_examples=300, deadline=None)
@given(st.one_of(MODEL, REPLIES), POLICIES, PROMPTS, st.lists(st.booleans(), min_size=1, max_size=9))
def test_any_tokens_keep_the_invariants(model: list[int], policy: Policy, prompt: str, obeys: list[bool]) -> None:
    watcher = channels.monitor(policy, prompt=prompt)
    output = kit.generate(watcher, model, any_score, lambda index: obeys[index % len(obeys)])
    spans = [(s.start, s.end) for s in watcher.steps]
    assert all(a < b for a, b in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    free = set(range(len(output))) - {i for a, b in spans for i in range(a, b)}
    zones, table = channels.reader(prompt), runtime(policy).table
    for index, token in enumerate(output):
        text = not zones.feed(token)
        # Text in a watched zone belongs to a step, in the zone where it stands.
        assert not text or zones.zone not in policy.zones or index not in free or not table.text([token]).strip()
    again = kit.replay(channels.monitor(policy, prompt=prompt), output, any_score)
    assert (again.steps, again.receipt) == (watcher.steps, watcher.receipt)


@functools.cache
def chat() -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=channels.tokenizer(), eos_token="<|return|>")
    fast.chat_template = channels.TEMPLATE
    return fast


def prompts(run: GuardRuntime) -> PromptReader:
    return PromptReader.build(chat(), run.table, run.grammar)


def prompt_ids(opened: str = "") -> list[int]:
    messages = [{"role": "user", "content": "car"}]
    return [*chat().apply_chat_template(messages, add_generation_prompt=True, return_dict=False), *encode(opened)]


@settings(max_examples=150, deadline=None)
@given(st.one_of(MODEL, REPLIES), POLICIES, st.sampled_from(["", HEADING, "<|channel|>final<|message|>"]))
def test_a_replay_equals_the_live_decisions(model: list[int], policy: Policy, opened: str) -> None:
    run = runtime(policy)
    live = StepMonitor(run, "car", zones=prompts(run).zones(prompt_ids(opened)), guard_id="kit")
    output = kit.generate(live, model)
    trace = Trace(
        guard_id="kit", created=1.0, model="channels", tokenizer_hash=run.tokenizer_hash, request="car",
        prompt_ids=prompt_ids(opened), output_ids=output, steps=live.steps, receipt=live.receipt,
    )  # fmt: skip
    replayer = Replayer(run, prompts(run))
    assert compare(trace, replayer.exact(trace)) == []
    assert replayer.shadow(trace).steps == [step for step in trace.steps if not step.injected]


def test_in_a_replay_a_forced_message_reads_as_its_trigger() -> None:
    unfinished = kit.CUE.removesuffix(".")
    for model, policy in (
        (f"{HEADING}{unfinished}<|end|>", ONE),
        (f"{HEADING}{kit.CUE}", REFUSE),
        (kit.CUE * 4, REFUSE),
    ):
        output, watcher = written(model, policy)
        (done,) = watcher.receipt.interventions
        again = channels.monitor(policy)
        for token in output[: done.at]:
            again.observe(token)
            again.decide(None)
        again.pass_over(output[done.at :])
        assert again.previous == watcher.previous == (VICTIM.text if policy is ONE else STOPPING)


@settings(max_examples=200, deadline=None)
@given(st.one_of(MODEL, REPLIES), POLICIES, st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_any_split_into_engine_steps_decides_the_same(model: list[int], policy: Policy, chunks: list[int]) -> None:
    run = runtime(policy)
    whole = channels.monitor(policy, prompt="<|start|>user<|message|>car<|end|>" + OPEN)
    output = kit.generate(whole, [max(0, token) for token in model])
    guard = EngineGuard(EngineSettings(spool=Path()), run, prompts(run), "replay", writes=False)
    row = rows.Row(guard.open(prompt_ids(), "kit"), [])
    for size in itertools.cycle(chunks):
        row.tokens += output[len(row.tokens) : len(row.tokens) + size]
        rows.read(guard, [row])
        if len(row.tokens) == len(output):
            break
    rows.finish(guard, row)
    assert (row.request.monitor.steps, row.request.monitor.receipt) == (whole.steps, whole.receipt)


def test_the_marks_that_end_a_turn_end_a_message() -> None:
    for end in (END, RETURN, CALL):
        reader = channels.reader(ANALYSIS)
        assert reader.feed(end)
        assert reader.state == "between"
