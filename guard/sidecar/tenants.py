"""Whose request it is, and what applies to it from its first token to its last, whatever is reloaded meanwhile."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace

from guard.keys import Quotas, hash_of
from guard.policy import Policy
from guard.runtime import GuardRuntime

NO_QUOTAS = Quotas()


@dataclass(frozen=True)
class Tenant:
    """A key's holder; without keys, everybody (the name is empty)."""

    name: str
    runtime: GuardRuntime
    """Under its own policy."""
    detector: str | None = None
    """Fingerprint by which the engine finds the detector; None: the one it was started with."""
    quotas: Quotas = NO_QUOTAS

    @property
    def policy(self) -> Policy:
        """What applies to its requests."""
        return self.runtime.policy

    @property
    def closed(self) -> bool:
        """Whether a response that is not proven guarded must be withheld."""
        return self.policy.fail_mode == "closed"

    @property
    def watching_all(self) -> Tenant:
        """The same under a policy that watches both zones: where nothing says in which of them an output begins."""
        policy = self.policy.model_copy(update={"zones": ("reasoning", "answer")})
        return (
            self if set(self.policy.zones) == set(policy.zones) else replace(self, runtime=self.runtime.under(policy))
        )

    def named(self, secret: str) -> dict[str, str]:
        """What the engine's guard is told with a request (`RequestArgs`); `secret` makes it believe it."""
        told = {"guard_secret": secret, "guard_policy": self.policy.canonical}
        if self.name:
            told["guard_tenant"] = self.name
        if self.detector is not None:
            told["guard_detector"] = self.detector
        return told

    def salted(self, secret: str) -> dict[str, str]:
        """What parts its prompts from other tenants' in the engine's prefix cache: how soon a first token comes would
        tell whether somebody had sent the same prompt before. Nothing where there are no tenants."""
        if not self.name:
            return {}
        return {"cache_salt": hmac.new(secret.encode(), self.name.encode(), "sha256").hexdigest()}


def holder(keys: Mapping[str, Tenant], authorization: str) -> Tenant | None:
    """Whose key an `Authorization` header carries; None: nobody's. `keys`: by their hash.

    All are compared, each in constant time: how long it takes tells nothing of any.
    """
    scheme, _, key = authorization.partition(" ")
    given, found = hash_of(key.strip()), None
    for known, tenant in keys.items():
        if hmac.compare_digest(known, given):
            found = tenant
    return found if scheme.lower() == "bearer" else None
