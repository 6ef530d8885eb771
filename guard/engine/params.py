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
    guard_off: bool = False
    """Only honoured where the engine was started with `allow_off` (in-process evaluation arms)."""


#: Parameters that could take a forced token away, and why. Everything else acts before the guard and cannot.
REFUSED: dict[str, tuple[Callable[[SamplingParams], bool], str]] = {
    "bad_words": (lambda p: bool(p.bad_words), "it can forbid the tokens of a trigger"),
    "allowed_token_ids": (lambda p: p.allowed_token_ids is not None, "it can forbid the tokens of a trigger"),
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
