"""What the engine's guard is told at its start, and on which way each part of it travels."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

SECRET_VARIABLE = "REASONGUARD_ENGINE_SECRET"
"""Where the engine's processes find `EngineSettings.secret`."""


class EngineSettings(BaseModel):
    """The guard's part of vLLM's `additional_config` (key `reasonguard`), and what only the environment carries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Path | None = None
    detector: Path | None = None
    """Detector directory; None is the packaged default."""
    detectors: Path | None = None
    """Directory of detectors by fingerprint, which requests may name; it only grows."""
    spool: Path
    """Directory that traces are appended to."""
    allow_off: bool = False
    """Whether a request may switch the guard off; `serve` never sets it."""
    secret: str | None = Field(default=None, exclude=True, repr=False)
    """Shared with the sidecar alone, so it is never dumped: `additional_config` stands on a command line, which every
    local user can read, and in vLLM's log.

    A request that carries it as `guard_probe` gets a real injection after its first token, the proof of life; one that
    carries it as `guard_aside` is watched by the sidecar itself; one that carries it as `guard_secret` names its
    policy. One that carries it nowhere gets the engine's policy at its strictest."""

    @classmethod
    def received(cls, given: object) -> EngineSettings:
        """What `additional_config` holds, with the secret from the environment."""
        settings = cls.model_validate(given)
        secret = os.environ.get(SECRET_VARIABLE) if settings.secret is None else settings.secret
        # Not validated together: an error would quote all of it into the log.
        return settings.model_copy(update={"secret": secret})

    @property
    def environment(self) -> dict[str, str]:
        """What the engine's processes must have in theirs."""
        return {} if self.secret is None else {SECRET_VARIABLE: self.secret}
