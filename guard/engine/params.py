"""What a request may ask of an engine under guard: its own arguments, and the sampling parameters that are refused.

The sidecar's allow-list is the first gate; this one stands inside the engine, for whoever reaches it directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import SamplingParams


class RequestArgs(BaseModel):
    """What may travel in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`)."""

    model_config = ConfigDict(extra="ignore", strict=True)

    guard_id: str | None = None
    guard_probe: str | None = None
    guard_aside: str | None = None
    """The sidecar's secret: it watches this request itself, token by token (mode `substitute`)."""
    guard_secret: str | None = None
    """The sidecar's secret: without it nothing below counts, and the engine's own policy applies at its strictest."""
    guard_policy: str | None = None
    """The policy in force for this request (`Policy.canonical`); the engine's own where it is missing."""
    guard_detector: str | None = None
    """Fingerprint of the detector that decides, in `EngineSettings.detectors`; None: the one the engine started
    with."""
    guard_tenant: str = ""
    """On whose behalf the request came: for its trace."""
    guard_off: bool = False
    """Only honoured where the engine was started with `allow_off` (in-process evaluation arms)."""


#: Parameters that could take a forced token away, or that hide steps from the guard, and why.
REFUSED: dict[str, tuple[Callable[[SamplingParams], bool], str]] = {
    "bad_words": (lambda p: bool(p.bad_words), "it can forbid the tokens of a trigger"),
    "allowed_token_ids": (lambda p: p.allowed_token_ids is not None, "it can forbid the tokens of a trigger"),
    "min_tokens": (lambda p: p.min_tokens > 0, "it forbids the token that ends a request"),
    "beam search": (
        # vLLM has no mark for it: every beam is asked for one token, with its text so far as the prompt.
        lambda p: p.max_tokens == 1 and not p.detokenize and bool(p.logprobs),
        "it asks token by token, so that no step is ever seen",
    ),
    "thinking_token_budget": (
        lambda p: getattr(p, "thinking_token_budget", None) is not None,
        "it acts after the guard and cuts a trigger off",
    ),
}


def validate_params(sampling_params: SamplingParams) -> None:
    """ValueError (over HTTP: 400) for guard arguments of the wrong shape and for parameters that outvote the guard."""
    try:
        RequestArgs.model_validate(sampling_params.extra_args or {})
    except ValidationError as error:
        raise ValueError(f"guard arguments: {error.errors()[0]['msg']}") from error
    for name, (given, why) in REFUSED.items():
        if given(sampling_params):
            raise ValueError(f"{name} cannot be used under the guard: {why}")


def is_warmup(sampling_params: SamplingParams) -> bool:
    """Whether these are the parameters that Model Runner V2 warms its sampler up with. No client can send them: they
    forbid the end (`min_tokens`), so `validate_params` refuses them at admission, which warm-ups do not pass."""
    if sampling_params.min_tokens == 0:
        return False  # every request that was admitted: nothing is built to compare it with
    warmup = getattr(type(sampling_params), "for_sampler_warmup", None)
    return warmup is not None and sampling_params == warmup()
