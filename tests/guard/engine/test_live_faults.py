"""Errors inside the live guard, and engines that the guard must not start in."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from classifiers.detector import Asked, Detector, RequestContext
from guard.engine.adapter import FQCN, engine_arguments
from guard.engine.params import RequestArgs
from guard.engine.session import EngineGuard
from guard.engine.settings import SECRET_VARIABLE
from guard.engine.v1 import ENGINE
from guard.errors import UserError
from guard.policy import Policy
from tests.conftest import Engine
from tests.guard.engine.conftest import EOS, OURS, REQUEST, Script, Swap
from tests.guard.engine.test_live_engine import check_corrected, trigger_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Failing(Detector):
    """The packaged detector whose `request` or `score` fails."""

    def __init__(self, fault: str) -> None:
        self.version, self.threshold = "failing", 0.5
        self._fault = fault

    def request(self, *messages: str) -> RequestContext:
        if self._fault == "request":
            raise MemoryError("no context")
        return RequestContext(np.zeros(1, np.float32), 1.0, 0)

    def score_batch(self, asked: Sequence[Asked], **_: Any) -> npt.NDArray[np.float32]:
        if self._fault == "raises":
            raise ValueError("no score")
        # Without a context a step must stay unscored, so a score of 0 here would show.
        return np.full(len(asked), 0.0 if self._fault == "request" else np.nan, np.float32)


ERRORS = {"request": "request: MemoryError: no context", "raises": "detector: ValueError: no score", "nan": None}


@pytest.mark.parametrize("fault", ERRORS)
def test_under_open_a_failing_detector_changes_no_text(engine: Engine, script: Script, swap: Swap, fault: str) -> None:
    with swap(policy=Policy(fail_mode="open"), detector=Failing(fault)):
        (reply,) = engine.run([(REQUEST, {"extra_args": OURS})])
    assert (reply.ids, reply.finish) == (script.comply, "stop")
    assert reply.trace is not None
    receipt = reply.trace.receipt
    assert (receipt.seen, receipt.scored, receipt.unscored, receipt.interventions) == (4, 0, 4, [])
    assert set(receipt.errors) == {ERRORS[fault]} - {None}
    assert not receipt.clean
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


@pytest.mark.parametrize("fault", ERRORS)
def test_under_closed_every_unscored_step_is_a_cue(engine: Engine, script: Script, swap: Swap, fault: str) -> None:
    with swap(policy=Policy(ladder=("trigger",)), detector=Failing(fault)):
        (reply,) = engine.run([(REQUEST, {})])
    assert reply.trace is not None
    receipt = reply.trace.receipt
    (item,) = receipt.interventions
    trigger = trigger_of(engine, item.trigger_id)
    # The very first step is answered, and the scripted model then declines.
    assert reply.ids == [*script.opening, *trigger.spaced, *script.refusal]
    assert (item.at, item.score, item.completed) == (len(script.opening), None, True)
    assert (receipt.scored, receipt.unscored) == (0, 2)
    assert set(receipt.errors) == {ERRORS[fault]} - {None}
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


class Broken:
    """Stands in a running request's place for a bug of our own in the monitor."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)

    def observe(self, token: int) -> None:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("fail_mode", ["closed", "open"])
def test_a_bug_in_the_monitor_never_reaches_the_engine(
    engine: Engine, script: Script, swap: Swap, monkeypatch: pytest.MonkeyPatch, fail_mode: str
) -> None:
    with swap(policy=Policy.model_validate({"fail_mode": fail_mode})) as guard:
        opened = guard.open

        def broken(*args: Any) -> Any:
            item = opened(*args)
            item.monitor = Broken(item.monitor)  # type: ignore[assignment]
            return item

        monkeypatch.setattr(guard, "open", broken)
        (reply,) = engine.run([(REQUEST, {"extra_args": OURS})])
    assert reply.ids == ([script.opening[0], EOS] if fail_mode == "closed" else script.comply)
    assert reply.trace is not None
    assert reply.trace.receipt.errors == ["observe: RuntimeError: a bug"]
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


def test_a_spool_that_cannot_be_written_leaves_the_engine_alone(
    engine: Engine, script: Script, swap: Swap, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = tmp_path / "spool"
    with swap(spool=lost), caplog.at_level(logging.ERROR, "guard"):
        lost.rmdir()
        lost.write_text("a file in its place")
        (reply,) = engine.run([(REQUEST, {})])
    assert reply.trace is None
    assert reply.ids[: script.at] == script.comply[: script.at]
    assert reply.ids[-len(script.refusal) :] == script.refusal
    assert "was not written" in caplog.text
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


@pytest.mark.parametrize("extra", [{"guard_id": 7}, {"guard_off": "no"}])
def test_a_request_with_malformed_guard_arguments_is_refused(
    engine: Engine, script: Script, extra: dict[str, Any]
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="guard arguments"):  # HTTP 400 in the server
        engine.chat([REQUEST], extra_args=extra)
    check_corrected(engine, script, engine.run([(REQUEST, {})])[0])


def configured(vllm_config: VllmConfig, **changes: Any) -> VllmConfig:
    """The same configuration with other fields, unchecked by vLLM."""
    changed = copy.copy(vllm_config)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def test_speculative_decoding_refuses_to_start(vllm_config: VllmConfig) -> None:
    from vllm.config import SpeculativeConfig
    from vllm.v1.sample.logits_processor import build_logitsprocs

    ngram = SpeculativeConfig(
        method="ngram", num_speculative_tokens=2, prompt_lookup_max=2, target_model_config=vllm_config.model_config,
        target_parallel_config=vllm_config.parallel_config,
    )  # fmt: skip
    speculative = configured(vllm_config, speculative_config=ngram)
    with pytest.raises(ValueError, match="cannot enforce under speculative decoding"):
        EngineGuard.from_vllm(speculative, ENGINE)
    with pytest.raises(ValueError, match="not supported when speculative decoding is enabled"):
        build_logitsprocs(speculative, torch.device("cpu"), False, False, [FQCN])


@pytest.mark.parametrize("additional", [{}, {"other": {}}, None, "text"])
def test_missing_settings_refuse_to_start(vllm_config: VllmConfig, additional: Any) -> None:
    with pytest.raises(ValueError, match="settings are missing"):
        EngineGuard.from_vllm(configured(vllm_config, additional_config=additional), ENGINE)


def reguarded(vllm_config: VllmConfig, **settings: Any) -> VllmConfig:
    return configured(vllm_config, **{"additional_config": {"reasonguard": settings}})


def test_malformed_settings_refuse_to_start(vllm_config: VllmConfig, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="spool"):
        EngineGuard.from_vllm(reguarded(vllm_config, allow_off=True), ENGINE)
    with pytest.raises(ValidationError, match="allow_of"):
        EngineGuard.from_vllm(reguarded(vllm_config, spool=str(tmp_path), allow_of=True), ENGINE)


def test_a_missing_part_refuses_to_start_and_is_named(vllm_config: VllmConfig, tmp_path: Path) -> None:
    spool = str(tmp_path / "spool")
    with pytest.raises(UserError, match=r"none\.yaml"):
        EngineGuard.from_vllm(reguarded(vllm_config, spool=spool, policy=str(tmp_path / "none.yaml")), ENGINE)
    with pytest.raises(UserError, match="no-detector"):
        EngineGuard.from_vllm(reguarded(vllm_config, spool=spool, detector=str(tmp_path / "no-detector")), ENGINE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        EngineGuard.from_vllm(reguarded(vllm_config, spool=str(tmp_path / "file" / "spool")), ENGINE)


def test_the_policy_of_the_settings_is_in_force(vllm_config: VllmConfig, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: strict\nthreshold: 0.25\ntriggers: [victim]\n")
    guard = EngineGuard.from_vllm(
        reguarded(vllm_config, spool=str(tmp_path / "s"), policy=str(tmp_path / "p.yaml")), ENGINE
    )
    assert (guard._runtime.policy.name, guard._runtime.threshold) == ("strict", 0.25)
    assert [t.id for t in guard._runtime.triggers] == ["victim"]
    assert guard._runtime.eos == EOS


def test_the_secret_is_the_environments(
    vllm_config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "s3cret")
    guard = EngineGuard.from_vllm(reguarded(vllm_config, spool=str(tmp_path / "s")), ENGINE)
    assert guard.stands_aside(RequestArgs(guard_aside="s3cret"))
    assert not guard.stands_aside(RequestArgs(guard_aside="other"))


def test_engine_arguments_carry_the_settings() -> None:
    assert engine_arguments({"spool": "s"}) == {
        "logits_processors": ["guard.engine.adapter:Guard"],
        "additional_config": {"reasonguard": {"spool": "s"}},
    }  # fmt: skip
