"""What an operator's files say: policy, keys with theirs, detector. Read as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from classifiers.artifact import MANIFEST_FILE, fingerprint, load_files
from classifiers.detector import DEFAULT, Detector
from guard.errors import UserError
from guard.keys import load_keys, policy_of
from guard.policy import Policy, load_policy
from guard.runtime import GuardRuntime
from guard.sidecar.canary import PERCENT, Canary
from guard.sidecar.tenants import Tenant

Adapt = Callable[[Policy, str], Policy]


@dataclass(frozen=True)
class Sources:
    """The files that `serve` was given, and where the engine looks for detectors that come later."""

    policy: Path | None = None
    detector: Path | None = None
    """None: the packaged one."""
    keys: Path | None = None
    detectors: Path | None = None
    canary: Path | None = None
    """A detector that decides nothing and is compared with the one that does; None: there is none."""
    canary_percent: float = PERCENT


@dataclass(frozen=True)
class Rules:
    """What is in force at one time."""

    default: Tenant
    """What applies where no key says otherwise."""
    keys: Mapping[str, Tenant] | None = None
    """Tenants by their key's hash; None: nobody is asked for a key."""
    canary: Canary | None = None

    @property
    def distinct(self) -> list[Tenant]:
        """One tenant for each policy."""
        found: dict[str, Tenant] = {}
        for tenant in (self.default, *(self.keys or {}).values()):
            found.setdefault(tenant.policy.hash, tenant)
        return list(found.values())


class RulesReader:
    """Reads the files again and again; `began` is what the engine was started with.

    `adapt` makes of each policy the one that can be applied, or UserError; it is told whose policy it is.
    """

    def __init__(self, sources: Sources, began: GuardRuntime, adapt: Adapt = lambda policy, whose: policy) -> None:
        self._sources, self._began, self._adapt = sources, began, adapt
        self._fingerprint = fingerprint(sources.detector or DEFAULT)
        self._detectors: dict[str, Detector] = {}
        """The newest detector that is not the one from the start."""
        self._canary: Canary | None = None

    def read(self) -> Rules:
        """The rules as the files have them now; UserError says what is wrong with which."""
        sources = self._sources
        named, detector = self._detector()
        policy = self._adapt(load_policy(sources.policy), "The policy")
        default, canary = Tenant("", self._began.under(policy, detector), named), self._new_detector()
        if sources.keys is None:
            return Rules(default, canary=canary)
        keys = {}
        for key in load_keys(sources.keys).keys:
            own = self._adapt(policy_of(sources.keys, key, policy), f"The policy of key {key.name}")
            runtime = default.runtime.under(own)
            keys[key.hash] = Tenant(key.name, runtime, named, key.quotas)
        return Rules(default, keys, canary)

    def _new_detector(self) -> Canary | None:
        """The canary; loaded again only where it is another."""
        source = self._sources.canary
        if source is None:
            return None
        if self._canary is None or self._canary.fingerprint != fingerprint(source):
            self._canary = Canary.load(source, self._sources.canary_percent)
        return self._canary

    def _detector(self) -> tuple[str | None, Detector | None]:
        source = self._sources.detector or DEFAULT
        named = fingerprint(source)
        if named == self._fingerprint:
            return None, None
        if self._sources.detectors is None:
            raise UserError(f"The detector {source} is another than at the start", fix="Start `serve` again")
        if named not in self._detectors:
            named = publish(source, self._sources.detectors)
            self._detectors = {named: Detector.load(self._sources.detectors / named)}
        return named, self._detectors[named]


def publish(source: Path, directory: Path) -> str:
    """Copies a detector to where the engine finds it, whole or not at all; returns its fingerprint, and its name."""
    _, files = load_files(source, "detector")
    draft = directory / f".draft-{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        shutil.copyfile(source / MANIFEST_FILE, draft / MANIFEST_FILE)
        load_files(draft, "detector")
        named = fingerprint(draft)
        if (directory / named).exists():
            shutil.rmtree(draft)
        else:
            draft.rename(directory / named)
    except OSError as error:
        raise UserError(f"Detector {source} cannot be copied to {directory}", got=error.strerror) from error
    return named
