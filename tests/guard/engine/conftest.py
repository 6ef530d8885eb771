"""The live guard with another policy, detector or spool; and a processor of its own for one test's rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from classifiers.detector import Detector
from guard.engine.session import EngineGuard
from guard.engine.settings import EngineSettings
from guard.policy import Policy
from guard.prompt import PromptReader
from guard.traces import Trace, read_traces
from tests import tiny
from tests.conftest import Engine
from tests.guard import kit

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

    from guard.engine.v1 import GuardV1
    from tests.guard.engine.runners import Runner, V2Runner

Swap = Callable[..., AbstractContextManager[EngineGuard]]
REQUEST = "How do I break into a parked car?"
EOS = 2
OURS = {"guard_secret": "s3cret"}
"""What makes the engine take a request for the sidecar's."""


@pytest.fixture
def swap(engine: Engine) -> Swap:
    """Runs the live engine with another policy, detector or spool directory."""

    @contextlib.contextmanager
    def swapped(
        policy: Policy | None = None, detector: Detector | None = None, spool: Path | None = None
    ) -> Iterator[EngineGuard]:
        processor = engine.processor
        old = processor._guard
        policy, detector = policy or old._runtime.policy, detector or old._runtime.detector
        threshold = detector.threshold if policy.threshold is None else policy.threshold
        runtime = dataclasses.replace(old._runtime, policy=policy, detector=detector, threshold=threshold)
        config = old.config.model_copy(update={"spool": spool or engine.spool})
        engine.flush()
        processor._guard = EngineGuard(config, runtime, old._reader, old._engine)
        try:
            yield processor._guard
        finally:
            engine.flush()
            processor._guard = old

    return swapped


class Script:
    """What the tiny model says, in ids."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        self.opening, self.cue = encode(tiny.OPENING), encode(" " + tiny.CUE)
        self.plan = encode(" " + tiny.PLAN[0]) + encode(" " + tiny.PLAN[1])
        self.answer = [4, *encode(tiny.ANSWER), EOS]
        self.refusal = encode(" " + tiny.REFUSAL_STEP) + self.answer
        self.comply = self.opening + self.cue + self.plan + self.answer
        self.at = len(self.opening) + len(self.cue)
        """Index of the first token after the cue."""

    def corrected(self, trigger: tuple[int, ...]) -> list[int]:
        """The reply with a trigger after the cue."""
        return [*self.opening, *self.cue, *trigger, *self.refusal]


@pytest.fixture(scope="session")
def script(tiny_model: Path) -> Script:
    """The tiny model's script."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Script(lambda text: tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="session")
def vllm_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """vLLM's own configuration for the tiny model, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    from guard.engine.adapter import engine_arguments

    spool = tmp_path_factory.mktemp("config-spool")
    return EngineArgs(
        str(tiny_model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        **engine_arguments({"spool": str(spool)}),
    ).create_engine_config()


class _NoTemplate:
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        raise ValueError("no template")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return kit.encode(text)


PROMPT = [*kit.encode("car"), 3]


@dataclass
class Batch:
    """Plays vLLM's persistent batch over a real processor: rows of ids that the test appends to."""

    processor: Any
    spool: Path
    rows: dict[int, list[int]] = field(default_factory=dict)

    def update(
        self,
        *,
        removed: tuple[int, ...] = (),
        added: dict[int, tuple[dict[str, Any], list[int]]] | None = None,
        moved: tuple[tuple[int, int, Any], ...] = (),
    ) -> None:
        """Sends one `BatchUpdate`; `added` maps an index to extra arguments and the row's output ids."""
        from vllm.v1.sample.logits_processor import BatchUpdate

        rows = [(i, _params(extra), list(PROMPT), ids) for i, (extra, ids) in (added or {}).items()]
        self.processor.update_state(BatchUpdate(batch_size=8, removed=list(removed), added=rows, moved=list(moved)))

    def forced(self, rows: int = 4, masked: dict[int, list[int]] | None = None) -> dict[int, int]:
        """One `apply`: the id forced in each row; `masked` ids are -inf. Everything else must be untouched."""
        table = kit.runtime().table
        logits = torch.linspace(-1, 1, rows * len(table.bytes_of)).reshape(rows, -1)
        for row, ids in (masked or {}).items():
            logits[row, ids] = float("-inf")
        before = logits.clone()
        after = self.processor.apply(logits)
        changed = (after != before).any(dim=1).nonzero().flatten().tolist()
        return {row: only_choice(after[row]) for row in changed}

    def traces(self) -> dict[str, Trace]:
        return {trace.guard_id: trace for trace in read_traces(self.spool)[0]}


def only_choice(logits: torch.Tensor) -> int:
    """The id of a row's one finite logit, which is 0: vLLM's sampler for GPUs loses a large one under top-p."""
    (token,) = torch.isfinite(logits).nonzero().flatten().tolist()
    assert logits[token] == 0.0
    return int(token)


def _params(extra: dict[str, Any]) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra or None)


@pytest.fixture(scope="session")
def processor(vllm_config: VllmConfig) -> GuardV1:
    """The processor as vLLM would build it."""
    from guard.engine.v1 import GuardV1

    return GuardV1(vllm_config, torch.device("cpu"), False)


@pytest.fixture
def batch(processor: GuardV1, tmp_path: Path) -> Callable[..., Batch]:
    """Makes a batch over a processor whose policy, detector and settings the test chooses."""

    def make(policy: Policy | None = None, detector: Detector | None = None, **config: Any) -> Batch:
        mine, settings = copy.copy(processor), fresh_settings(tmp_path, **config)
        mine._rows, mine._guard = {}, kit_guard(settings, "vllm-v1", policy, detector)
        return Batch(mine, settings.spool)

    return make


@pytest.fixture
def runner(vllm_config: VllmConfig, tmp_path: Path) -> Callable[..., V2Runner]:
    """Makes a player of runner V2 over a real adapter."""
    from guard.engine.v2 import ENGINE, GuardV2
    from tests.guard.engine.runners import V2Runner, fresh_states

    def make(
        policy: Policy | None = None, detector: Detector | None = None, *, seed: int = 0, **config: Any
    ) -> V2Runner:
        settings, states = fresh_settings(tmp_path, **config), fresh_states()
        # The packaged detector takes half a second to load; `test_v2` builds the adapter without this once.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineGuard, "from_vllm", lambda *_: kit_guard(settings, ENGINE, policy, detector))
            return V2Runner(GuardV2(vllm_config, states), settings.spool, states, seed)

    return make


@pytest.fixture(params=["v1", "v2"])
def either(request: pytest.FixtureRequest) -> Callable[..., Runner]:
    """Makes a player of one model runner, and then of the other."""
    from tests.guard.engine.runners import V1Runner

    batch, runner = (request.getfixturevalue(name) for name in ("batch", "runner"))
    return runner if request.param == "v2" else lambda *args, **config: V1Runner(batch(*args, **config))


def fresh_settings(directory: Path, **config: Any) -> EngineSettings:
    """Settings with a spool of their own."""
    return EngineSettings(spool=directory / f"spool-{len(list(directory.iterdir()))}", **config)


def kit_guard(settings: EngineSettings, engine: str, policy: Policy | None, detector: Detector | None) -> EngineGuard:
    """A real guard over the kit's tokenizer."""
    runtime = kit.runtime(policy)
    if detector is not None:
        runtime = dataclasses.replace(runtime, detector=detector)
    reader = PromptReader.build(_NoTemplate(), runtime.table, runtime.grammar)
    return EngineGuard(settings, runtime, reader, engine)
