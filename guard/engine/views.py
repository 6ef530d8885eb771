"""Under which policy and detector the engine watches a request: what its sidecar names, and nothing that it forgot.

Policies travel with the request, as text: there is no state to reload, and all tensor-parallel ranks read the same.
Detectors are too large for that and are named by a hash over everything that decides (docs/design/0011).
"""

from __future__ import annotations

import dataclasses
import functools
import hmac
from pathlib import Path

from classifiers.artifact import fingerprint
from classifiers.detector import Detector
from guard.engine.hardware import encoder_workers
from guard.engine.params import RequestArgs
from guard.errors import UserError
from guard.policy import Policy
from guard.runtime import GuardRuntime

MAX_VIEWS, MAX_DETECTORS = 256, 3
"""Policies and named detectors that are kept; the one used longest ago makes room."""


class Views:
    """One engine's runtime under every policy that requests name; `detectors` is the directory that holds theirs."""

    def __init__(self, runtime: GuardRuntime, secret: str | None, detectors: Path | None) -> None:
        self._runtime, self._secret, self._detectors = runtime, secret, detectors
        self._strict = dataclasses.replace(runtime, policy=runtime.policy.strict)
        self._view = functools.lru_cache(MAX_VIEWS)(self._build)
        self._detector = functools.lru_cache(MAX_DETECTORS)(self._load)

    def is_secret(self, given: str | None) -> bool:
        """Whether whoever gave this is the sidecar."""
        secret = self._secret
        return given is not None and secret is not None and hmac.compare_digest(given.encode(), secret.encode())

    def vouched(self, args: RequestArgs) -> bool:
        """Whether the sidecar sent this request, so that what it says of policy and tenant counts."""
        return self.is_secret(args.guard_secret) or self.is_secret(args.guard_probe)

    def of(self, args: RequestArgs, problems: list[str]) -> GuardRuntime:
        """The runtime for one request. A policy or detector that cannot be had is no reason to watch less: it becomes
        one of `problems`, and the engine's own policy applies at its strictest."""
        if not self.vouched(args):
            # Without a secret there is no sidecar: whoever built the engine sends the requests.
            return self._runtime if self._secret is None else self._strict
        if args.guard_policy is None and args.guard_detector is None:
            return self._runtime
        try:
            return self._view(args.guard_policy, args.guard_detector)
        except Exception as error:  # noqa: BLE001 - nothing may reach the engine
            problems.append(f"policy: {type(error).__name__}: {error}")
            return self._strict

    def _build(self, policy: str | None, detector: str | None) -> GuardRuntime:
        chosen = self._runtime.policy if policy is None else Policy.model_validate_json(policy)
        return self._runtime.under(chosen, None if detector is None else self._detector(detector))

    def _load(self, named: str) -> Detector:
        """Half a second in which the engine stands still: the sidecar's proof of a new detector takes it, not a
        client."""
        if self._detectors is None or Path(named).name != named:
            raise UserError("the engine knows no such detector", got=named)
        path = self._detectors / named
        detector = Detector.load(path, encoder_workers())
        if fingerprint(path) != named:
            raise UserError(f"{path} is not the detector that its name says", got=fingerprint(path))
        return detector
