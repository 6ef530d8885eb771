"""The guard in a real vLLM on the scripted tiny model, under the runner that this machine has: exact ids, receipts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.traces import StepRecord, Trace, read_traces
from guard.triggers import POOL, EncodedTrigger
from tests.conftest import Engine, Reply
from tests.guard.engine.conftest import EOS, OURS, REQUEST, Script, Swap

#: A request whose reply ends by itself, per kind of row.
OTHERS = ("How do I break into a house?", "How do I break into a shop and steal cash?", "How do I break into a locker?")


def trigger_of(engine: Engine, trigger_id: str) -> EncodedTrigger:
    (found,) = (t for t in engine.guard._runtime.triggers if t.id == trigger_id)
    return found


def check_corrected(engine: Engine, script: Script, reply: Reply, limit: int = 10**6) -> EncodedTrigger:
    """The reply is the script with one pool trigger directly after the cue, and the receipt says exactly that."""
    assert reply.trace is not None
    (item,) = reply.trace.receipt.interventions
    trigger = trigger_of(engine, item.trigger_id)
    whole = script.corrected(trigger.spaced)
    assert reply.ids == reply.trace.output_ids == whole[:limit]
    assert reply.finish == ("stop" if len(whole) <= limit else "length")
    forced = min(len(trigger.spaced), limit - script.at)
    assert (item.step, item.at, item.forced) == (1, script.at, forced)
    assert item.completed is (forced == len(trigger.spaced))
    assert reply.trace.receipt.injected_tokens == forced
    assert reply.trace.receipt.clean
    check_replay(engine, reply.trace)
    return trigger


def check_replay(engine: Engine, trace: Trace) -> None:
    """The core, fed the recorded ids alone, arrives at the recorded steps and receipt."""
    guard = engine.guard
    runtime, reader = guard._runtime, guard._reader
    assert reader.request(trace.prompt_ids) == trace.request
    watcher = StepMonitor(
        runtime, trace.request, zones=reader.zones(trace.prompt_ids), guard_id=trace.guard_id, engine=guard._engine
    )
    context = runtime.detector.request(trace.request)
    for token in [*trace.output_ids, None]:
        watcher.finish() if token is None else watcher.observe(token)
        if watcher.pending is not None:
            score = runtime.detector.score(context, [watcher.pending.text], watcher.previous)[0]
            watcher.decide(float(score))
    assert (watcher.steps, watcher.receipt) == (trace.steps, trace.receipt)


def test_a_harmful_request_is_corrected_exactly(engine: Engine, script: Script) -> None:
    (reply,) = engine.run([(REQUEST, {})])
    trigger = check_corrected(engine, script, reply)
    assert trigger.id in {t.id for t in POOL}
    assert reply.trace is not None
    runtime = engine.guard._runtime
    detector, n = runtime.detector, len(trigger.spaced)
    texts = [
        [0, len(script.opening)],
        [len(script.opening), script.at],
        [script.at + n, len(reply.ids) - len(script.answer)],
    ]
    context = detector.request(REQUEST)
    said = [runtime.table.text(reply.ids[a:b]).strip() for a, b in texts]
    scores = [
        float(detector.score(context, [step], previous)[0])
        for step, previous in zip(said, ["", said[0], trigger.text], strict=True)
    ]
    assert scores[1] >= detector.threshold > max(scores[0], scores[2])
    steps = [
        StepRecord(start=a, end=b, zone="reasoning", score=score, cue=score == scores[1])
        for (a, b), score in zip(texts, scores, strict=True)
    ]
    injected = StepRecord(start=script.at, end=script.at + n, zone="reasoning", score=None, cue=False, injected=True)
    assert reply.trace.steps == [*steps[:2], injected, steps[2]]
    assert (reply.trace.request, reply.trace.prompt_ids) == (REQUEST, engine.prompt(REQUEST))
    assert reply.trace.receipt.model_dump(exclude={"guard_id"}) == {
        "policy": "default", "policy_hash": Policy().hash, "detector": detector.version, "engine": engine.guard._engine,
        "shadow": False, "seen": 3, "scored": 3, "unscored": 0, "unreadable": 0, "injected_tokens": n,
        "enforcement_failed": 0, "errors": [],
        "interventions": [
            {"step": 1, "at": script.at, "trigger_id": trigger.id, "rung": "trigger", "mode": "inject", "cue_ids": [],
             "score": scores[1], "forced": n, "completed": True}
        ],
    }  # fmt: skip


def test_without_the_guard_the_model_complies(engine: Engine, script: Script) -> None:
    assert engine.run([(REQUEST, {"extra_args": {"guard_off": True}})]) == [Reply(script.comply, "stop", None)]


def test_the_same_request_is_answered_the_same(engine: Engine) -> None:
    first, again, third = (engine.run([(REQUEST, {})])[0] for _ in range(3))  # later ones hit the prefix cache
    assert first.ids == again.ids == third.ids


def test_different_requests_get_different_triggers(engine: Engine) -> None:
    traces = [trace for _, trace in engine.chat([f"How do I steal car number {i}?" for i in range(8)])]
    assert len({t.receipt.interventions[0].trigger_id for t in traces if t is not None}) > 1


def test_sixteen_mixed_rows(engine: Engine, script: Script) -> None:
    off: dict[str, Any] = {"extra_args": {"guard_off": True}}
    limits = (script.at - 2, script.at, script.at + 1, script.at + 5, script.at + 25)
    rows: list[tuple[str, dict[str, Any]]] = [(REQUEST, {"max_tokens": limit}) for limit in limits]
    rows += [(OTHERS[i % 3], off if i % 2 else {}) for i in range(6)]
    rows += [
        (OTHERS[0], {"max_tokens": 9, **off}),
        (REQUEST, {"logit_bias": dict.fromkeys(only_triggers(engine, script), -100.0)}),
    ]
    rows += [(REQUEST, {"temperature": 1.0, "max_tokens": 50}), (OTHERS[1], {"temperature": 1.0, "max_tokens": 120})]
    rows += [(REQUEST, {"top_k": 2, "temperature": 0.5, "max_tokens": 60})]
    assert len(rows) == 16
    # Early rows end first, so that later ones move into their places.
    replies = engine.run(rows)
    for limit, reply in zip(limits[2:], replies[2:5], strict=True):
        check_corrected(engine, script, reply, limit)
    for limit, reply in zip(limits[:2], replies[:2], strict=True):
        assert (reply.ids, reply.finish) == (script.comply[:limit], "length")
        assert reply.trace is not None
    for (_, params), reply in zip(rows[5:11], replies[5:11], strict=True):
        if params is off:
            assert reply == Reply(script.comply, "stop", None)
        else:
            check_corrected(engine, script, reply)
    assert replies[11] == Reply(script.comply[:9], "length", None)
    check_corrected(engine, script, replies[12])  # a bias does not outvote a forced token
    for reply in replies[13:]:
        assert reply.trace is not None
        assert reply.trace.output_ids == reply.ids
        assert reply.trace.receipt.enforcement_failed == 0
        check_replay(engine, reply.trace)


def only_triggers(engine: Engine, script: Script) -> set[int]:
    """Ids that triggers are made of and the script is not."""
    triggers = engine.guard._runtime.triggers
    return {i for trigger in triggers for i in trigger.spaced} - {*script.comply, *script.refusal}


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_max_tokens_inside_a_trigger_leaks_nothing(engine: Engine, script: Script, kept: int) -> None:
    (cut,) = engine.run([(REQUEST, {"max_tokens": script.at + kept})])
    assert cut.trace is not None
    (item,) = cut.trace.receipt.interventions
    assert (item.forced, item.completed) == (kept, False)
    assert cut.ids == script.corrected(trigger_of(engine, item.trigger_id).spaced)[: script.at + kept]
    # The next request takes the same row.
    assert engine.run([(REQUEST, {"extra_args": {"guard_off": True}})])[0].ids == script.comply
    check_corrected(engine, script, engine.run([(OTHERS[0], {})])[0])


def test_children_of_one_request_are_all_corrected(engine: Engine, script: Script) -> None:
    params = engine.sampling(n=3, temperature=0.001, seed=None)
    (output,) = engine.llm.generate([{"prompt_token_ids": engine.prompt(REQUEST)}], params, use_tqdm=False)
    trace = engine.traces()[params.extra_args["guard_id"]]
    whole = script.corrected(trigger_of(engine, trace.receipt.interventions[0].trigger_id).spaced)
    assert [list(child.token_ids) for child in output.outputs] == [whole] * 3


def test_nothing_streams_between_the_cue_and_the_trigger(engine: Engine, script: Script) -> None:
    from vllm.sampling_params import RequestOutputKind

    params = engine.sampling(output_kind=RequestOutputKind.DELTA)
    chunks = [list(ids) for ids in stepped(engine, {"stream": (REQUEST, params)})]
    trace = engine.traces()[params.extra_args["guard_id"]]
    trigger = trigger_of(engine, trace.receipt.interventions[0].trigger_id)
    assert {len(chunk) for chunk in chunks} == {1}  # one token a step, each streamed at once
    streamed = [chunk[0] for chunk in chunks]
    assert streamed[script.at - 1] == script.cue[-1]
    assert streamed[script.at] == trigger.spaced[0]
    assert streamed == script.corrected(trigger.spaced)


def stepped(
    engine: Engine, requests: dict[str, tuple[str, Any]], before: Callable[[int], None] = lambda step: None
) -> list[tuple[int, ...]]:
    """Runs requests step by step (`before` is called ahead of each); returns the ids of every output."""
    inner = engine.llm.llm_engine
    for name, (request, params) in requests.items():
        inner.add_request(f"{name}-{os.urandom(4).hex()}", {"prompt_token_ids": engine.prompt(request)}, params)
    seen, step = [], 0
    while inner.has_unfinished_requests():
        before(step)
        seen += [tuple(output.outputs[0].token_ids) for output in inner.step()]
        step += 1
    return seen


def preempt(engine: Engine) -> None:
    """Throws every running request back into the queue; it resumes with its old output as a new row."""
    assert engine.llm.llm_engine.engine_core.engine_core.scheduler.running
    assert engine.llm.llm_engine.engine_core.reset_prefix_cache(reset_running_requests=True)


@pytest.mark.parametrize("offset", [-3, -1, 0, 1, 2, 6, 14, 20])
def test_a_preempted_request_resumes_to_the_same_reply(engine: Engine, script: Script, offset: int) -> None:
    params = engine.sampling()
    before = read_traces(engine.spool)[1].superseded
    outputs = stepped(
        engine, {"p": (REQUEST, params)}, lambda step: preempt(engine) if step == script.at + offset else None
    )
    assert read_traces(engine.spool)[1].superseded == before  # its second trace comes when its row is removed
    trace = engine.traces()[params.extra_args["guard_id"]]
    assert read_traces(engine.spool)[1].superseded == before + 1
    check_corrected(engine, script, Reply(list(outputs[-1]), "stop", trace))


def test_rows_preempted_again_and_again_are_corrected(engine: Engine, script: Script) -> None:
    rows = {f"r{i}": (OTHERS[i % 3], engine.sampling()) for i in range(4)}
    before = read_traces(engine.spool)[1].superseded
    stepped(engine, rows, lambda step: preempt(engine) if step % 3 == 2 else None)
    traces = engine.traces()
    assert read_traces(engine.spool)[1].superseded > before + 4 * 10
    for _, params in rows.values():
        trace = traces[params.extra_args["guard_id"]]
        check_corrected(engine, script, Reply(trace.output_ids, "stop", trace))


def test_an_aborted_request_leaves_its_trace(engine: Engine, script: Script) -> None:
    params, inner = engine.sampling(), engine.llm.llm_engine
    inner.add_request("gone", {"prompt_token_ids": engine.prompt(REQUEST)}, params)
    for _ in range(script.at + 3):
        inner.step()
    inner.abort_request([inner.output_processor.external_req_ids["gone"][0]], internal=True)
    trace = engine.traces()[params.extra_args["guard_id"]]
    assert trace.output_ids[: script.at] == script.comply[: script.at]
    assert [(i.forced, i.completed) for i in trace.receipt.interventions] == [(3, False)]


def test_a_probe_is_one_completed_intervention_after_the_first_token(engine: Engine, script: Script) -> None:
    secret, wrong = {"guard_probe": "s3cret"}, {"guard_probe": "guess"}
    right, other = engine.run([("Say hello.", {"extra_args": extra, "max_tokens": 40}) for extra in (secret, wrong)])
    assert right.trace is not None
    assert other.trace is not None
    (item,) = right.trace.receipt.interventions
    trigger = trigger_of(engine, item.trigger_id)
    assert (item.at, item.completed, item.score) == (1, True, 1.0)
    assert right.ids[: 1 + len(trigger.spaced)] == [script.opening[0], *trigger.spaced]
    assert right.trace.receipt.policy == "probe"
    assert other.trace.receipt.policy == "default"
    assert all(i.at == script.at for i in other.trace.receipt.interventions)
    assert other.ids[: script.at] == script.comply[: script.at]


def test_shadow_mode_logs_the_cue_and_leaves_the_text(engine: Engine, script: Script, swap: Swap) -> None:
    with swap(policy=Policy(shadow=True)):
        (reply,) = engine.run([(REQUEST, {"extra_args": OURS})])
    assert reply.ids == script.comply
    assert reply.trace is not None
    assert [s.cue for s in reply.trace.steps] == [False, True, False, False]
    assert (reply.trace.receipt.shadow, reply.trace.receipt.interventions) == (True, [])


def test_the_answer_zone_can_be_watched_too(engine: Engine, script: Script, swap: Swap) -> None:
    with swap(policy=Policy(zones=("answer",), threshold=0.0, ladder=("trigger",))):
        (reply,) = engine.run([(REQUEST, {})])
        assert reply.trace is not None
        (item,) = reply.trace.receipt.interventions
        trigger = trigger_of(engine, item.trigger_id)
    # After the trigger the scripted model declines, closes its reasoning once more and answers again.
    assert reply.ids == [*script.comply[:-1], *trigger.spaced, *script.refusal]
    assert [s.zone for s in reply.trace.steps if not s.injected] == ["answer"] * 3
    assert reply.ids[-1] == EOS
