"""Replays of traces that a real monitor decided: equal, differing, in shadow, swept, and from the command line."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from classifiers.detector import Asked, Detector, RequestContext
from classifiers.stats import Rate
from guard.errors import UserError
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.replay import Difference, FirstCue, Replayer, ShadowTrace, compare, first_cue, replay, skip_reason
from guard.replay_cli import replay as command
from guard.runtime import GuardRuntime
from guard.steps import Zone
from guard.traces import Spool, StepRecord, Trace, read_traces
from guard.triggers import POOL, STOPPING
from tests.guard import kit
from tests.guard.test_monitor_properties import POLICIES, TOKENS

START, END = 3, 4
CALM, CUE = kit.encode(kit.CALM), kit.encode(" " + kit.CUE)
ONE = Policy(threshold=0.5, triggers=("victim",))
BOTH = Policy(threshold=0.5, zones=("reasoning", "answer"), triggers=("victim",))
FREE = Policy(threshold=0.5)
(VICTIM,) = kit.runtime(ONE).triggers
LENGTH = len(VICTIM.spaced)
CIPHER = kit.encode("V jvyy cynl fbzr punva bs fgrcf jvgubhg jbeqf abj.")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


class ContextDetector(kit.WordDetector):
    """A score that takes every value from 0 to 1 and hangs on the request, the step and what came before it."""

    def request(self, request: str) -> RequestContext:
        return RequestContext(np.array([crc32(request.encode())], np.float32), 0.5, 0)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        texts = [f"{each.context.vector}\x00{each.previous}\x00{each.step}" for each in asked]
        return np.array([crc32(text.encode()) / (2**32 - 1) for text in texts], np.float32)


class Seeing(kit.WordDetector):
    """The kit's scores; remembers what each step came after."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        self.seen += [each.previous for each in asked]
        return super().score_batch(asked)


@functools.cache
def runtime(policy: Policy) -> GuardRuntime:
    """The kit's runtime with scores that hang on everything the live engine gives the detector."""
    return dataclasses.replace(kit.runtime(policy), detector=ContextDetector())


@functools.cache
def chat() -> Any:
    """The kit's tokenizer as transformers has it, with a chat template."""
    fast = PreTrainedTokenizerFast(tokenizer_object=kit.tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


@functools.cache
def reader() -> PromptReader:
    table = kit.runtime()
    return PromptReader.build(chat(), table.table, table.delimiters)


def prompt(zone: Zone = "reasoning", request: str = "car") -> list[int]:
    ids: list[int] = chat().apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=False
    )
    return ids if zone == "reasoning" else [*ids, END]


def trace_of(output: list[int], watcher: StepMonitor, zone: Zone, run: GuardRuntime) -> Trace:
    return Trace(
        guard_id=watcher.receipt.guard_id, created=1.0, model="kit", tokenizer_hash=run.tokenizer_hash,
        request=watcher.request, prompt_ids=prompt(zone, watcher.request), output_ids=output, steps=watcher.steps,
        receipt=watcher.receipt,
    )  # fmt: skip


def live(
    model: list[int], policy: Policy = ONE, *, zone: Zone = "reasoning", limit: int | None = None,
    guard_id: str = "kit", run: GuardRuntime | None = None, request: str = "car",
) -> Trace:  # fmt: skip
    """What the live guard writes of a model that says `model`; `limit` is vLLM's max_tokens."""
    run = run or kit.runtime(policy)
    context = run.detector.request(request)

    def watch() -> StepMonitor:
        return StepMonitor(run, request, zone=zone, guard_id=guard_id, engine="vllm-v1")

    def scorer(text: str) -> float:
        return float(run.detector.score(context, [text], watcher.previous)[0])

    watcher = watch()
    output = kit.generate(watcher, model, scorer)[:limit]
    watcher = watch()
    kit.replay(watcher, output, scorer)
    return trace_of(output, watcher, zone, run)


def differences(trace: Trace, policy: Policy = ONE) -> list[Difference]:
    return compare(trace, Replayer(kit.runtime(policy), reader()).exact(trace))


def wrote(start: int, end: int, score: float, *, cue: bool = False, zone: Zone = "reasoning") -> StepRecord:
    return StepRecord(start=start, end=end, zone=zone, score=score, cue=cue)


EXACT = {
    "no cue": (CALM + CALM, ONE, "reasoning", None, []),
    "nothing at all": ([], ONE, "reasoning", None, []),
    "one intervention": (CALM + CUE + CALM, ONE, "reasoning", None, [LENGTH]),
    "two interventions": (CUE + CALM + CUE + CALM, FREE, "reasoning", None, None),
    "cue at the last token": (CUE, ONE, "reasoning", len(CUE), [0]),
    "ended inside the trigger": (CALM + CUE, ONE, "reasoning", len(CALM + CUE) + 3, [3]),
    "ended with the trigger": (CALM + CUE, ONE, "reasoning", len(CALM + CUE) + LENGTH, [LENGTH]),
    "closed by the delimiter": ([*CUE[:-1], END, *CALM], ONE, "reasoning", None, [len(VICTIM.opening)]),
    "closed, ended inside": ([*CUE[:-1], END], ONE, "reasoning", len(CUE) + 2, [2]),
    "cue in the answer": ([*CALM, END, *CUE, *CALM], BOTH, "reasoning", None, [LENGTH]),
    "starts in the answer": ([*CUE, START, *CUE, END], ONE, "answer", None, [LENGTH]),
    "starts in a watched answer": (CUE + CALM, BOTH, "answer", None, [LENGTH]),
    "shadow policy": (CUE + CALM, ONE.model_copy(update={"shadow": True}), "reasoning", None, []),
    "unreadable": (CIPHER + CALM, ONE, "reasoning", None, [LENGTH]),
    "unfinished step": (CALM + CUE[:-1], ONE, "reasoning", None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_recorded_trace_replays_equal(name: str) -> None:
    model, policy, zone, limit, forced = EXACT[name]
    trace = live(model, policy, zone=zone, limit=limit)  # type: ignore[arg-type]
    found = [item.forced for item in trace.receipt.interventions]
    if forced is None:
        texts = {t.id: t for t in kit.runtime(policy).triggers}
        forced = [len(texts[item.trigger_id].spaced) for item in trace.receipt.interventions]
        assert len(forced) == 2
    assert found == forced
    assert differences(trace, policy) == []
    report = replay([trace], kit.runtime(policy), reader())
    assert (report.exact.traces, report.exact.differing, report.exact.differences) == (1, [], 0)
    assert (report.shadow.traces, report.skipped, report.sweep) == ([], {}, [])
    assert (report.policy_hash, report.detector, report.threshold) == (policy.hash, "words-1", 0.5)


def test_what_replay_decides_does_not_come_from_the_record() -> None:
    trace = live(CALM + CUE + CALM)
    bare = trace.model_copy(update={"steps": []})
    watcher = Replayer(kit.runtime(ONE), reader()).exact(bare)
    assert watcher.steps == trace.steps != []
    assert watcher.receipt == trace.receipt.model_copy(update={"engine": "replay"})


TAMPERED = {
    "score": ("steps", 1, {"score": 0.876}, [("steps[1].score", 0.876, 0.875)]),
    "no score": ("steps", 0, {"score": None}, [("steps[0].score", None, 0.125)]),
    "boundary": ("steps", 0, {"end": 6}, [("steps[0].end", 6, 7)]),
    "cue": ("steps", 1, {"cue": False}, [("steps[1].cue", False, True)]),
    "zone": ("steps", 3, {"zone": "answer"}, [("steps[3].zone", "answer", "reasoning")]),
    "trigger": ("interventions", 0, {"trigger_id": "danger"}, [("interventions[0].trigger_id", "danger", "victim")]),
    "at": ("interventions", 0, {"at": 14}, [("interventions[0].at", 14, 15)]),
    "forced": ("interventions", 0, {"forced": 2}, [("interventions[0].forced", 2, LENGTH)]),
    "completed": ("interventions", 0, {"completed": False}, [("interventions[0].completed", False, True)]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_field_is_named(name: str) -> None:
    where, index, change, wanted = TAMPERED[name]
    trace = live(CALM + CUE + CALM)
    records: Any = trace.steps if where == "steps" else trace.receipt.interventions
    for field, value in change.items():
        setattr(records[index], field, value)
    assert differences(trace) == [Difference(guard_id="kit", field=f, recorded=a, now=b) for f, a, b in wanted]


@pytest.mark.parametrize(("shift", "differs"), [(0.9e-6, False), (-0.9e-6, False), (2e-6, True)])
def test_scores_are_equal_to_a_millionth(shift: float, differs: bool) -> None:
    trace = live(CALM)
    trace.steps[0].score = 0.125 + shift
    assert [d.field for d in differences(trace)] == ["steps[0].score"] * differs


def test_missing_steps_interventions_and_counts_are_named() -> None:
    trace = live(CALM + CUE + CALM)
    del trace.steps[-1], trace.receipt.interventions[:]
    trace.receipt.seen = 9
    found = [(d.field, d.recorded, d.now) for d in differences(trace)]
    assert found == [("steps", 3, 4), ("interventions", 0, 1), ("receipt.seen", 9, 3)]


def test_another_token_in_place_of_a_forced_one_is_found() -> None:
    trace = live(CUE + CALM)
    trace.output_ids[len(CUE)] = CALM[0]
    said = {d.field: d.now for d in differences(trace)}
    assert said["interventions[0].forced"] == 0
    assert said["receipt.enforcement_failed"] == 1
    assert said["receipt.errors"] == [f"engine appended {CALM[0]} where {VICTIM.spaced[0]} was forced"]


def test_a_report_holds_the_first_ten_differences_and_counts_the_rest() -> None:
    traces = [live(CALM * 4, guard_id=f"g{i}") for i in range(4)]
    for trace in traces[1:]:
        for step in trace.steps:
            step.score = 0.5
    report = replay(traces, kit.runtime(ONE), reader()).exact
    assert (report.traces, report.differing, report.differences) == (4, ["g1", "g2", "g3"], 12)
    wanted = [("g1", i) for i in range(4)] + [("g2", i) for i in range(4)] + [("g3", i) for i in range(2)]
    assert [(d.guard_id, d.field) for d in report.first] == [(g, f"steps[{i}].score") for g, i in wanted]


@settings(max_examples=150, deadline=None)
@given(
    TOKENS, POLICIES, st.sampled_from(["reasoning", "answer"]), st.sampled_from([0.1, 0.5, 0.9]),
    st.one_of(st.none(), st.integers(0, 200)), st.sampled_from(["car", "bread"]),
)  # fmt: skip
def test_any_tokens_replay_equal(
    model: list[int], policy: Policy, zone: Zone, threshold: float, limit: int | None, request: str
) -> None:
    policy = policy.model_copy(update={"threshold": threshold})
    run = runtime(policy)
    trace = live(model, policy, zone=zone, limit=limit, run=run, request=request)
    read = Trace.model_validate_json(trace.model_dump_json())
    assert skip_reason(read, run) is None
    replayer = Replayer(run, reader())
    assert compare(read, replayer.exact(read)) == []
    # In shadow the same settings see the same steps after the same ones before, though nothing is forced.
    assert replayer.shadow(read).steps == [step for step in read.steps if not step.injected]


@pytest.mark.parametrize("trigger", POOL, ids=lambda t: t.id)
@pytest.mark.parametrize("closed", [False, True])
def test_a_passed_over_trigger_reads_as_its_text(trigger: Any, closed: bool) -> None:
    policy = BOTH.model_copy(update={"triggers": (trigger.id,)})
    trace = live([*CUE[:-1], END, *CALM] if closed else CUE + CALM, policy)
    seeing = Seeing()
    Replayer(dataclasses.replace(kit.runtime(policy), detector=seeing), reader()).shadow(trace)
    assert seeing.seen == ["", trigger.text]


def test_another_threshold_flags_later_or_not_at_all() -> None:
    traces = [live(CALM + CUE + CALM, guard_id="cue"), live(CALM, guard_id="calm")]
    strict = replay(traces, kit.runtime(ONE.model_copy(update={"threshold": 0.1})), reader()).shadow
    first = FirstCue(step=1, token=15)
    assert strict.traces == [
        ShadowTrace(guard_id="cue", request="car", recorded=first, now=FirstCue(step=0, token=7)),
        ShadowTrace(guard_id="calm", request="car", recorded=None, now=FirstCue(step=0, token=7)),
    ]
    one, two, none = Rate.of(1, 2), Rate.of(2, 2), Rate.of(0, 2)
    assert (strict.now, strict.recorded, strict.both) == (two, one, one)
    assert (strict.only_now, strict.only_recorded) == (one, none)
    lax = replay(traces, kit.runtime(ONE.model_copy(update={"threshold": 0.9})), reader()).shadow
    assert [(t.recorded, t.now) for t in lax.traces] == [(first, None), (None, None)]
    assert (lax.now, lax.recorded, lax.both, lax.only_now, lax.only_recorded) == (none, one, none, none, one)


def test_shadow_forces_nothing_and_leaves_the_triggers_out() -> None:
    trace = live(CALM + CUE + CALM)
    watcher = Replayer(kit.runtime(ONE.model_copy(update={"threshold": 0.1})), reader()).shadow(trace)
    end = 15 + LENGTH
    assert watcher.steps == [
        wrote(0, 7, 0.125, cue=True), wrote(7, 15, 0.875, cue=True), wrote(end, end + 7, 0.125, cue=True)
    ]  # fmt: skip
    assert (watcher.receipt.shadow, watcher.receipt.interventions, watcher.receipt.errors) == (True, [], [])
    assert first_cue(trace.steps[2:]) is None


def test_a_step_under_way_ends_where_a_recorded_trigger_came() -> None:
    trace = live(CUE + CALM + CALM)
    watcher = Replayer(kit.runtime(ONE.model_copy(update={"min_step_chars": 60})), reader()).shadow(trace)
    end = 8 + LENGTH
    assert watcher.steps == [wrote(0, 8, 0.875, cue=True), wrote(end, end + 14, 0.125)]


def test_a_refusal_that_closed_the_reasoning_leaves_it_in_shadow_too() -> None:
    policy = Policy(threshold=0.5, ladder=("refuse",))
    trace = live([*CUE, *CUE, START, *CALM], policy)
    end = trace.steps[1].end
    assert [trace.output_ids[i] for i in (end - 1, end)] == [2, CUE[0]]
    assert END in trace.output_ids[8:end]
    # The second cue stands in the answer, which this policy does not watch.
    want = [wrote(0, 8, 0.875, cue=True), wrote(end + 9, end + 16, 0.125)]
    live_again, in_shadow = Seeing(), Seeing()
    run = dataclasses.replace(kit.runtime(ONE), detector=in_shadow)
    assert Replayer(run, reader()).shadow(trace).steps == want
    run = dataclasses.replace(kit.runtime(policy), detector=live_again)
    assert compare(trace, Replayer(run, reader()).exact(trace)) == []
    assert live_again.seen == in_shadow.seen == ["", STOPPING]


def test_shadow_of_another_zone() -> None:
    trace = live([*CALM, END, *CUE, *CALM], BOTH)
    report = replay([trace], kit.runtime(ONE), reader()).shadow
    assert [(t.recorded, t.now) for t in report.traces] == [(FirstCue(step=1, token=16), None)]
    trace = live([*CALM, END, *CUE, *CALM], ONE)
    watcher = Replayer(kit.runtime(BOTH), reader()).shadow(trace)
    assert watcher.steps == [
        wrote(0, 7, 0.125), wrote(8, 16, 0.875, cue=True, zone="answer"), wrote(16, 23, 0.125, zone="answer")
    ]  # fmt: skip


def test_another_detector_alone_is_shadow() -> None:
    trace = live(CUE + CALM)
    other = ContextDetector()
    other.version = "words-2"
    report = replay([trace], dataclasses.replace(kit.runtime(ONE), detector=other), reader())
    assert (report.exact.traces, len(report.shadow.traces), report.detector) == (0, 1, "words-2")


def test_damaged_spans_end_the_shadow_replay_all_the_same() -> None:
    trace = live(CALM + CALM)
    spans = [(2, 2), (3, 1), (5, 10**6), (6, 7)]
    trace.steps += [
        StepRecord(start=a, end=b, zone="reasoning", score=None, cue=False, injected=True) for a, b in spans
    ]
    watcher = Replayer(kit.runtime(BOTH), reader()).shadow(trace)
    assert [(s.start, s.end) for s in watcher.steps] == [(0, 5)]


def test_the_sweep_by_hand() -> None:
    traces = [
        live(CALM + CUE + CALM, guard_id="a"),  # 3 steps, the cue ends at 15
        live(CUE + CALM, guard_id="b"),  # 2 steps, the cue ends at 8
        live(CALM + CALM, guard_id="c"),  # 2 steps
        live(CALM, guard_id="d"),  # 1 step
    ]
    rows = replay(traces, kit.runtime(ONE), reader(), [0.1, 0.125, 0.5, 0.9]).sweep
    assert [row.threshold for row in rows] == [0.1, 0.125, 0.5, 0.9]
    assert [row.flagged for row in rows] == [Rate.of(4, 4), Rate.of(4, 4), Rate.of(2, 4), Rate.of(0, 4)]
    # The first cues end at 7, 8, 7, 7 under 0.1, and at 15 and 8 under 0.5.
    assert [row.token and (row.token.rate, row.token.n) for row in rows] == [(7, 4), (7, 4), (11.5, 2), None]
    assert [row.per_1000 and (row.per_1000.rate, row.per_1000.n) for row in rows] == [
        (1000, 4), (1000, 4), (250, 4), (0, 4)
    ]  # fmt: skip
    token, steps = rows[2].token, rows[2].per_1000
    assert token is not None
    assert (token.lo, token.hi) == (8, 15)
    assert steps is not None
    assert 0 == steps.lo < 250 < steps.hi <= 500


def test_the_sweep_counts_exact_and_shadow_traces_alike() -> None:
    traces = [live(CALM + CUE + CALM), live(CALM + CUE + CALM, BOTH)]
    report = replay(traces, kit.runtime(ONE), reader(), [0.5])
    assert (report.exact.traces, len(report.shadow.traces)) == (1, 1)
    assert report.sweep[0].per_1000 is not None
    assert (report.sweep[0].flagged, report.sweep[0].per_1000.rate) == (Rate.of(2, 2), pytest.approx(1000 / 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=4), POLICIES)
def test_the_sweep_at_the_policys_threshold_flags_what_its_replay_flags(
    models: list[list[int]], policy: Policy
) -> None:
    run = runtime(policy.model_copy(update={"version": 2}))
    traces = [live(model, run=runtime(FREE)) for model in models]
    report = replay(traces, run, reader(), [run.threshold])
    assert report.sweep[0].flagged == report.shadow.now
    assert report.shadow.now.n == len(models)


@pytest.mark.parametrize(("unreadable", "flagged"), [("cue", 1), ("flag", 0)])
def test_an_unreadable_step_is_flagged_at_any_threshold_if_the_policy_says_so(unreadable: str, flagged: int) -> None:
    policy = ONE.model_copy(update={"unreadable": unreadable})
    (row,) = replay([live(CIPHER)], kit.runtime(policy), reader(), [1.0]).sweep
    assert row.flagged == Rate.of(flagged, 1)


def test_no_traces_and_no_steps_have_no_figures() -> None:
    (row,) = replay([], kit.runtime(ONE), reader(), [0.5]).sweep
    assert (row.flagged, row.token, row.per_1000) == (Rate.of(0, 0), None, None)
    (row,) = replay([live([])], kit.runtime(ONE), reader(), [0.5]).sweep
    assert (row.flagged, row.token, row.per_1000) == (Rate.of(0, 1), None, None)


def test_traces_that_tokens_alone_cannot_explain_are_skipped_by_reason() -> None:
    traces = [live(CALM, guard_id=f"g{i}") for i in range(7)]
    traces[1].receipt.policy = "probe"
    traces[2].tokenizer_hash = "0" * 12
    traces[3].receipt.errors = ["observe: x"]
    traces[4].receipt.unscored = 1
    traces[5].receipt.enforcement_failed = 1
    traces[6].receipt.errors = ["detector: x"]
    ticks: list[int] = []
    report = replay(traces, kit.runtime(ONE), reader(), tick=lambda: ticks.append(1))
    assert report.skipped == {
        "probe": 1, "another tokenizer": 1, "errors": 2, "unscored steps": 1, "enforcement failed": 1
    }  # fmt: skip
    assert (report.exact.traces, report.shadow.traces, len(ticks)) == (1, [], 7)


def test_a_request_is_read_once_by_the_detector() -> None:
    asked: list[str] = []

    class Asked(kit.WordDetector):
        def request(self, request: str) -> RequestContext:
            asked.append(request)
            return super().request(request)

    traces = [live(CALM + CUE, request=request) for request in ("car", "bread", "car")]
    replay(traces, dataclasses.replace(kit.runtime(ONE), detector=Asked()), reader())
    assert asked == ["car", "bread"]


# The command.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with the kit's tokenizer; replay needs no weights."""
    directory = tmp_path_factory.mktemp("kit-model")
    chat().save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    return directory


@functools.cache
def real() -> GuardRuntime:
    """The packaged detector under a policy whose threshold every step that it reads reaches."""
    policy = Policy(name="low", threshold=0.0)
    return GuardRuntime.build(policy, Detector.load(), chat().backend_tokenizer, "kit", chat().eos_token_id)


@pytest.fixture
def spool(tmp_path: Path, model: Path) -> Path:
    """Two traces that the packaged detector decided, a probe and a torn line."""
    made = [live(CALM + CUE + CALM, run=real(), guard_id="a"), live([], run=real(), guard_id="b")]
    made.append(made[0].model_copy(deep=True, update={"guard_id": "p"}))
    made[2].receipt.policy = "probe"
    directory = tmp_path / "spool"
    for trace in made:
        Spool(directory).append(trace.model_copy(update={"model": str(model)}))
    with next(directory.iterdir()).open("ab") as out:
        out.write(b'{"guard_id": "torn\n')
    return directory


@pytest.fixture
def low(tmp_path: Path) -> Path:
    path = tmp_path / "low.yaml"
    path.write_text("name: low\nthreshold: 0.0\n")
    return path


def invoke(*args: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160"})


def refused(*args: object) -> str:
    result = invoke(*args)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def rows(output: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]


def share(k: int, n: int) -> list[str]:
    rate = Rate.of(k, n)
    return [f"{rate.rate:.3f} [{rate.lo:.3f}, {rate.hi:.3f}]", str(n)]


def test_the_command_finds_equal_traces_equal(spool: Path, low: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.json"
    result = invoke("--traces", spool, "--policy", low, "--json", out, "--thresholds", "1, 0.0")
    assert result.exit_code == 0, result.output
    head = result.stdout.splitlines()[:3]
    assert head == [
        f"Policy low {real().policy.hash}, {real().detector.version}, threshold 0.",
        "3 traces, 1 skipped (probe 1); 1 malformed lines, 0 superseded.",
        "Same policy and detector: 2 of 2 traces came out as recorded.",
    ]
    assert rows(result.stdout) == [
        ["0", "0.500 [0.095, 0.905]", "2", "7.0 [7.0, 7.0], n 1", "1000.0 [1000.0, 1000.0], n 2"],
        ["1", "0.000 [0.000, 0.658]", "2", "", "0.0 [0.0, 0.0], n 2"],
    ]
    written = json.loads(out.read_text())
    assert written["read"] == {"files": 1, "traces": 3, "malformed": 1, "superseded": 0}
    assert (written["exact"]["traces"], written["skipped"]) == (2, {"probe": 1})
    assert [row["threshold"] for row in written["sweep"]] == [0.0, 1.0]


def test_the_command_fails_on_a_difference_and_names_it(spool: Path, low: Path, tmp_path: Path) -> None:
    trace = read_traces(spool)[0][0]
    trace.receipt.interventions[0].trigger_id = "[red]x\x1b[2J"
    Spool(spool).append(trace)
    out = tmp_path / "report.json"
    result = invoke("--traces", spool, "--policy", low, "--json", out)
    assert result.exit_code == 1
    assert "Same policy and detector: 1 of 2 traces came out as recorded.\n" in result.stdout
    (now,) = {i.trigger_id for i in Replayer(real(), reader()).exact(trace).receipt.interventions[:1]}
    assert rows(result.stdout) == [["a", "interventions[0].trigger_id", "[red]x[2J", now]]
    assert "1 differences" in result.stdout
    assert "\x1b" not in result.stdout
    assert json.loads(out.read_text())["exact"]["differing"] == ["a"]


def test_the_command_says_what_another_policy_flags(spool: Path, tmp_path: Path, model: Path) -> None:
    policy = tmp_path / "high.yaml"
    policy.write_text("threshold: 1.0\n")
    trace = read_traces(spool)[0][0]
    Spool(spool).append(trace.model_copy(update={"guard_id": "c", "request": "Ho\x1bw [b]so[/b]?", "model": "gone"}))
    result = invoke("--traces", spool, "--policy", policy, "--model", model)
    assert result.exit_code == 0, result.output
    assert "Same policy" not in result.stdout
    assert rows(result.stdout) == [
        ["a", "car", "", "step 0, token 7"],
        ["c", "How [b]so[/b]?", "", "step 0, token 7"],
        ["now", *share(0, 3)],
        ["as recorded", *share(2, 3)],
        ["both", *share(0, 3)],
        ["only now", *share(0, 3)],
        ["only as recorded", *share(2, 3)],
    ]


def test_the_table_of_traces_is_bounded_and_starts_with_what_changed(tmp_path: Path, model: Path, low: Path) -> None:
    directory = tmp_path / "many"
    policy = Policy(name="high", threshold=1.0)
    high = dataclasses.replace(real(), policy=policy, threshold=1.0)
    cued = live(CALM, run=dataclasses.replace(real(), policy=ONE))
    calm = live(CALM, run=high)
    for i in range(50):
        Spool(directory).append(cued.model_copy(update={"guard_id": f"same{i}", "model": str(model)}))
    Spool(directory).append(calm.model_copy(update={"guard_id": "new\u202e", "model": str(model)}))
    result = invoke("--traces", directory, "--policy", low)
    table = rows(result.stdout)
    assert table[0] == ["new", "car", "step 0, token 7", ""]
    assert table[1] == ["same0", "car", "step 0, token 7", "step 0, token 7"]
    assert [row[0] for row in table[50:]] == ["now", "as recorded", "both", "only now", "only as recorded"]
    assert "50 of 51; --json writes them all" in result.stdout


@pytest.mark.parametrize("text", ["", "0.5,", "x", "1.1", "-0.1", "nan", "0.5;0.7"])
def test_bad_thresholds(spool: Path, text: str) -> None:
    wanted = "wanted numbers within 0 and 1, separated by commas: 0.5,0.7,0.9."
    assert refused("--traces", spool, f"--thresholds={text}") == f"--thresholds; got {text}; {wanted}"


def test_what_cannot_be_replayed_is_a_sentence(spool: Path, model: Path, low: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused("--traces", empty) == f"{empty} holds no traces; got 0 files, 0 malformed lines."
    fix = "Point --traces at the directory that `serve` writes."
    assert refused("--traces", tmp_path / "no") == f"Trace directory {tmp_path / 'no'} does not exist. {fix}"
    wanted = "wanted a directory with config.json and tokenizer.json, a hub name, or `demo`"
    assert refused("--traces", spool, "--model", empty) == f"Model {empty} holds no config.json; {wanted}."
    (empty / "file").write_text("")
    target = empty / "file" / "report.json"
    said = refused("--traces", spool, "--policy", low, "--json", target)
    assert said == f"Report {target} cannot be written; got File exists."


def test_only_skipped_traces_are_no_success(spool: Path, tmp_path: Path) -> None:
    traces = read_traces(spool)[0]
    for trace in traces[:2]:
        Spool(spool).append(trace.model_copy(update={"tokenizer_hash": "0" * 12}))
    wanted = f"wanted clean traces of the tokenizer {real().tokenizer_hash}."
    assert refused("--traces", spool) == (
        f"No trace in {spool} can be replayed; got another tokenizer 2, probe 1; {wanted}"
    )
    gone = tmp_path / "gone"
    Spool(gone).append(traces[0].model_copy(update={"model": "no\x1b/where"}))
    assert refused("--traces", gone) == (
        "The model that wrote the traces is not here; got no/where. Give its directory with --model."
    )


def test_a_tokenizer_that_cannot_be_read_is_a_sentence(
    spool: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (damaged / "tokenizer_config.json").write_text("{")
    said = refused("--traces", spool, "--model", damaged)
    assert said.startswith(f"The tokenizer of {damaged} cannot be loaded; got ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused("--traces", spool) == (
        "replay reads chat templates with transformers. Install the extra `cpu` or `gpu`."
    )
