"""The one class that `serve` gives vLLM: it becomes the adapter of whichever model runner builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor as V1Interface

from guard.engine import params
from guard.engine.v1 import GuardV1

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Interface
except ImportError:
    # vLLM before 0.31: Model Runner V2 takes no custom processors, and vLLM falls back to V1.
    V2Interface = V1Interface

if TYPE_CHECKING:
    from vllm import SamplingParams

FQCN = "guard.engine.adapter:Guard"
_BASES: tuple[type, ...] = (V1Interface,) if V2Interface is V1Interface else (V1Interface, V2Interface)


class Guard(*_BASES):  # type: ignore[misc]  # both runners' loaders ask for a subclass of their own interface
    """Runner V1 builds it with (config, device, pin memory), runner V2 with (config, request states)."""

    def __new__(cls, *args: Any) -> Any:
        """The adapter for the runner that calls; ValueError when the engine's configuration names the other one."""
        v2 = len(args) == 2
        if bool(args[0].use_v2_model_runner) is not v2:
            raise ValueError(
                f"the guard was loaded by model runner V{1 + v2}, but the engine is configured for "
                f"V{2 - v2}: set VLLM_USE_V2_MODEL_RUNNER={int(v2)} or leave it unset"
            )
        if v2:
            from guard.engine.v2 import GuardV2

            return GuardV2(*args)
        return GuardV1(*args)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """See `guard.engine.params.validate_params`."""
        params.validate_params(sampling_params)


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` that load the guard with these settings (see `EngineSettings`)."""
    return {"logits_processors": [FQCN], "additional_config": {"reasonguard": settings}}
