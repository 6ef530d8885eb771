"""Mode `substitute` over a scripted model: what is let out, what is taken back, what the monitor records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.replay import Replayer
from guard.replay_report import FirstCue, recorded_cue, replaced_cues
from guard.sidecar.errors import ApiError
from guard.sidecar.speech import Speech
from guard.sidecar.substitute import Piece, Substitution
from tests.guard import kit
from tests.guard.recorded import differences, reader, trace_of

START, END, EOS = 3, 4, 2
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
ANSWER = [END, *kit.encode("My reply ends here."), EOS]
PROMPT = [1, 0]
SUBSTITUTE = Policy(mode="substitute", triggers=("victim", "crosses-line"))
TRIGGERS = {t.id: t for t in kit.runtime(SUBSTITUTE).triggers}


@dataclass
class Model:
    """Says what `script` says after an output, `size` ids a piece; remembers what it was asked to continue."""

    script: Callable[[list[int]], list[int]]
    size: int = 3
    asked: list[list[int]] = field(default_factory=list)
    closed: int = 0

    async def go_on(self, ids: list[int], most: int) -> AsyncGenerator[Piece]:
        """Continues; a reply that runs out of room ends with `length`."""
        self.asked.append(ids)
        said = self.script(ids[len(PROMPT) :])
        finish = "stop" if len(said) <= most else "length"
        said = said[:most]
        try:
            for start in range(0, len(said), self.size):
                last = start + self.size >= len(said)
                yield Piece(said[start : start + self.size], finish if last else None)
        finally:
            self.closed += 1


def run(model: Model, policy: Policy = SUBSTITUTE, limit: int = 200) -> tuple[Substitution, list[list[int]]]:
    """The finished substitution and the runs of ids that it let out."""
    watcher = StepMonitor(
        kit.runtime(policy), "car", zones=kit.runtime(policy).zones("reasoning"), guard_id="kit", mode="substitute"
    )

    async def score(watched: StepMonitor) -> float:
        assert watched.pending is not None
        return kit.score(watched.pending.text)

    async def all_of() -> list[list[int]]:
        return [ids async for ids in found.released()]

    found = Substitution(watcher, PROMPT, limit, EOS, model.go_on, score)
    return found, asyncio.run(all_of())


def test_an_engine_that_runs_on_is_cut_at_what_was_asked_for() -> None:
    class Endless(Model):
        async def go_on(self, ids: list[int], most: int) -> AsyncGenerator[Piece]:
            try:
                for _ in range(100):
                    yield Piece(CALM)
            finally:
                self.closed += 1

    model = Endless(lambda _: [])
    found, runs = run(model, limit=2 * len(CALM) + 1)
    assert [token for ids in runs for token in ids] == found.output == [*CALM, *CALM, CALM[0]]
    assert (found.finish, model.closed) == ("length", 1)


def said(output: list[int]) -> bool:
    """Whether a trigger was said last."""
    return any(list(t.spaced) == output[-len(t.spaced) :] for t in TRIGGERS.values())


def complying(output: list[int]) -> list[int]:
    """Complies, and goes on calmly after a trigger."""
    return [*CALM, *ANSWER] if said(output) else [*CALM, *CUE, *CUE, *ANSWER]


def test_a_trigger_takes_the_cues_place() -> None:
    model = Model(complying)
    found, released = run(model)
    (item,) = found.monitor.receipt.interventions
    trigger = TRIGGERS[item.trigger_id].spaced
    assert found.output == [*CALM, *trigger, *CALM, *ANSWER]
    assert [token for ids in released for token in ids] == found.output
    assert found.finish == "stop"
    assert (item.mode, item.at, item.step, item.cue_ids) == ("substitute", len(CALM), 1, CUE)
    assert (item.forced, item.completed) == (len(trigger), True)
    spans = [(s.start, s.end, s.cue, s.injected) for s in found.monitor.steps]
    a, b = len(CALM), len(CALM) + len(trigger)
    assert spans == [(0, a, False, False), (a, b, False, True), (b, b + a, False, False)]
    # The cue was seen and scored, though no step of the output is one.
    assert (found.monitor.receipt.seen, found.monitor.receipt.scored) == (3, 3)
    # The model was asked again, without the cue in its context.
    assert model.asked == [PROMPT, [*PROMPT, *CALM, *trigger]]
    assert model.closed == 2, "the first stream is closed, which ends the engine's request"


def test_the_trigger_is_the_one_that_injection_chooses() -> None:
    found, _ = run(Model(complying))
    injected = kit.monitor(Policy(triggers=SUBSTITUTE.triggers))
    # The key holds the policy's hash, which the mode changes.
    injected.receipt.policy_hash = SUBSTITUTE.hash
    kit.generate(injected, [*CALM, *CUE, *CALM, *ANSWER])
    assert [i.trigger_id for i in injected.receipt.interventions] == [
        i.trigger_id for i in found.monitor.receipt.interventions
    ]


def test_nothing_is_let_out_before_its_step_is_decided() -> None:
    _, released = run(Model(lambda output: [*CALM, *CALM, *ANSWER], size=1))
    assert released[:2] == [CALM, CALM]
    assert released[2:] == [[token] for token in ANSWER], "the answer is not watched, so nothing of it is held"


def test_a_cue_that_the_end_of_reasoning_closes_is_taken_back_with_the_delimiter() -> None:
    open_cue = kit.encode(" I will agree to help")
    found, _ = run(Model(lambda output: [*CALM, *(() if said(output) else open_cue), *ANSWER]))
    (item,) = found.monitor.receipt.interventions
    assert item.cue_ids == [*open_cue, END]
    assert found.output == [*CALM, *TRIGGERS[item.trigger_id].spaced, *CALM, *ANSWER]


def test_a_cue_at_the_very_start_is_replaced_by_a_trigger_that_opens() -> None:
    first = kit.encode(kit.CUE)
    found, _ = run(Model(lambda output: [*CALM, *ANSWER] if output else [*first, *ANSWER]))
    (item,) = found.monitor.receipt.interventions
    assert (item.at, item.cue_ids) == (0, first)
    assert found.output[: item.forced] == list(TRIGGERS[item.trigger_id].plain)


def test_an_output_that_ends_inside_a_cue_loses_it() -> None:
    open_cue = kit.encode(" I will agree to help")
    limit = len(CALM) + len(open_cue)
    found, _ = run(Model(complying), limit=limit)
    (item,) = found.monitor.receipt.interventions
    assert item.cue_ids == open_cue
    assert found.output == [*CALM, *TRIGGERS[item.trigger_id].spaced[: len(open_cue)]]
    assert (found.finish, item.completed, item.forced) == ("length", False, len(open_cue))


def test_the_ladder_ends_a_model_that_will_not_be_turned() -> None:
    policy = SUBSTITUTE.model_copy(update={"ladder": ("trigger", "refuse")})
    model = Model(lambda output: [*CUE, *ANSWER])
    found, _ = run(model, policy)
    first, second = found.monitor.receipt.interventions
    _, refusal = kit.runtime(policy).refusal.ids("spaced", kit.runtime(policy).zones("reasoning"))
    assert second.trigger_id == "refuse"
    assert found.output == [*TRIGGERS[first.trigger_id].plain, *refusal]
    assert found.output[-1] == EOS
    assert found.finish == "stop"
    assert len(model.asked) == 2, "a refusal needs no engine"


def test_without_a_trigger_left_the_ladder_goes_on_as_it_does_under_injection() -> None:
    policy = SUBSTITUTE.model_copy(update={"triggers": ("victim",)})
    model = Model(lambda output: [*CUE, *CUE, *ANSWER])
    found, _ = run(model, policy)
    injected = kit.monitor(policy.model_copy(update={"mode": "inject"}))
    kit.generate(injected, [*CUE, *CUE, *ANSWER])
    answers = [(i.rung, i.trigger_id) for i in found.monitor.receipt.interventions]
    assert answers == [("trigger", "victim"), ("refuse", "refuse")]
    assert answers == [(i.rung, i.trigger_id) for i in injected.receipt.interventions]
    assert (found.finish, found.output[-1]) == ("stop", EOS)
    assert differences(trace_of(found.output, found.monitor, "reasoning", kit.runtime(policy)), policy) == []


def test_a_ladder_that_is_used_up_lets_the_next_cue_through() -> None:
    policy = SUBSTITUTE.model_copy(update={"ladder": ("trigger",)})
    found, _ = run(Model(lambda output: [*CUE, *ANSWER]), policy)
    assert [s.cue for s in found.monitor.steps] == [False, True]
    assert len(found.monitor.receipt.interventions) == 1


def test_a_replay_under_another_policy_reads_the_replaced_cue() -> None:
    found, _ = run(Model(complying))
    trace = trace_of(found.output, found.monitor, "reasoning", kit.runtime(SUBSTITUTE))
    strict = Policy(threshold=0.1, triggers=SUBSTITUTE.triggers)
    steps = Replayer(kit.runtime(strict), reader()).shadow(trace).steps
    table = kit.runtime().table
    # The model wrote three steps; the trigger is none of them.
    assert [(s.end - s.start, s.score) for s in steps] == [(len(CALM), 0.125), (len(CUE), 0.875), (len(CALM), 0.125)]
    assert recorded_cue(trace) == FirstCue(step=1, token=len(CALM) + len(CUE))
    assert table.text(replaced_cues(trace)[len(CALM)]).strip() == kit.CUE


def test_shadow_takes_nothing_back() -> None:
    found, released = run(Model(complying), SUBSTITUTE.model_copy(update={"shadow": True}))
    assert found.output == [*CALM, *CUE, *CUE, *ANSWER] == [token for ids in released for token in ids]
    assert found.monitor.receipt.interventions == []


def test_an_engine_that_breaks_off_is_an_error_and_what_was_held_is_not_delivered() -> None:
    async def broken(ids: list[int], most: int) -> AsyncGenerator[Piece]:
        yield Piece([*CALM, *CUE[:3]])

    async def calm(watched: StepMonitor) -> float:
        return 0.1

    async def all_of() -> list[list[int]]:
        return [ids async for ids in found.released()]

    runtime = kit.runtime(SUBSTITUTE)
    watcher = StepMonitor(runtime, "car", zones=runtime.zones("reasoning"), guard_id="kit", mode="substitute")
    found = Substitution(watcher, PROMPT, 50, EOS, broken, calm)
    with pytest.raises(ApiError, match="broke off"):
        asyncio.run(all_of())
    assert (found.finish, found.delivered, found.output) == (None, CALM, [*CALM, *CUE[:3]])


WORDS = st.lists(st.sampled_from([tuple(CALM), tuple(CUE), (END,), (START,), tuple(ANSWER), (EOS,), (7,), (99,)]),
                 max_size=12)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(WORDS, st.integers(1, 9), st.integers(1, 80))
def test_any_model_and_any_pieces_give_the_same_and_no_cue_gets_out(
    words: list[tuple[int, ...]], size: int, limit: int
) -> None:
    script = [token for word in words for token in word] or [EOS]
    policy = Policy(mode="substitute")
    one, released = run(Model(lambda output: script, size=1), policy, limit)
    other, again = run(Model(lambda output: script, size=size), policy, limit)
    assert one.output == other.output == [token for ids in released for token in ids]
    assert [token for ids in again for token in ids] == one.output
    assert (one.monitor.steps, one.monitor.receipt) == (other.monitor.steps, other.monitor.receipt)
    assert len(one.output) <= limit
    trace = trace_of(one.output, one.monitor, "reasoning", kit.runtime(policy))
    assert differences(trace, policy) == [], "the recorded ids and the replaced cues give the same decisions again"
    if len(one.monitor.receipt.interventions) < len(policy.ladder):
        assert not any(s.cue for s in one.monitor.steps), "every cue was answered while the ladder had a rung"


def test_speech_tells_the_fields_apart_and_waits_for_whole_characters() -> None:
    runtime = kit.runtime()
    speech = Speech(runtime.table, runtime.zones("reasoning"))
    euro = kit.encode("€")
    assert len(euro) == 3
    assert speech.say([*kit.encode("so "), *euro[:2]]) == [("reasoning", "so ")]
    assert speech.say([euro[2], END, *kit.encode("yes")]) == [("reasoning", "€"), ("content", "yes")]
    assert speech.say([euro[0], START]) == [("content", "�")]
    assert speech.say([*kit.encode("</think>"), EOS, 10**9]) == []
    assert speech.say(kit.encode("x"), last=True) == [("content", "x")]
