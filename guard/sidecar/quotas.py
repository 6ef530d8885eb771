"""How much each tenant may ask for: buckets that fill evenly, in this process's memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from guard.sidecar.errors import ApiError
from guard.sidecar.tenants import Tenant

MINUTE, DAY = 60.0, 86_400.0
_BUSY = 1.0
"""Seconds until a tenant with too many requests under way may try again: nobody knows when one ends."""
Clock = Callable[[], float]


class OverQuota(ApiError):
    """A request beyond its tenant's quota: HTTP 429, and after how many seconds to try again."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(429, "rate_limit_exceeded", message)
        self.retry_after = max(1, math.ceil(wait))

    def body(self) -> dict[str, Any]:
        """As OpenAI names it."""
        body = super().body()
        body["error"]["type"] = "rate_limit_error"
        return body

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """With `Retry-After`."""
        return super().response({**(headers or {}), "retry-after": str(self.retry_after)})


class Bucket:
    """Starts full, fills evenly in `seconds`, and may fall below zero: what a request costs is known afterwards."""

    def __init__(self, size: int, seconds: float, clock: Clock) -> None:
        self.size, self._seconds, self._clock = size, seconds, clock
        self._level, self._at = float(size), clock()

    @property
    def level(self) -> float:
        """How much is there now."""
        return min(self.size, self._level + (self._clock() - self._at) * self.size / self._seconds)

    def take(self, amount: float) -> None:
        """Takes it, there or not."""
        self._level, self._at = self.level - amount, self._clock()

    def wait(self) -> float:
        """Seconds until at least one is there."""
        return max(0.0, 1 - self.level) * self._seconds / self.size

    def resize(self, size: int) -> None:
        """Another size; what was used stays used."""
        used = self.size - self.level
        self.size, self._level, self._at = size, size - used, self._clock()


@dataclass
class _Usage:
    minute: Bucket | None = None
    day: Bucket | None = None
    under_way: int = 0


class Meter:
    """Counts by tenant's name, so that a reload forgives nothing; a restart begins anew. One event loop."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    def enter(self, tenant: Tenant) -> None:
        """Counts a request in, or raises `OverQuota`; `leave` must follow."""
        quotas, usage = tenant.quotas, self._of(tenant)
        if quotas.concurrent is not None and usage.under_way >= quotas.concurrent:
            raise OverQuota(f"{quotas.concurrent} requests of this key are under way, which is its limit.", _BUSY)
        if usage.day is not None and usage.day.level < 1:
            said = f"This key's {quotas.tokens_per_day} tokens per day are used up."
            raise OverQuota(said, usage.day.wait())
        if usage.minute is not None:
            if usage.minute.level < 1:
                said = f"This key's {quotas.requests_per_minute} requests per minute are used up."
                raise OverQuota(said, usage.minute.wait())
            usage.minute.take(1)
        usage.under_way += 1

    def leave(self, tenant: Tenant) -> None:
        """The request is over."""
        self._usage[tenant.name].under_way -= 1

    def charge(self, name: str, tokens: int) -> None:
        """Takes tokens of a tenant's day, prompt and output."""
        usage = self._usage.get(name)
        if usage is not None and usage.day is not None:
            usage.day.take(tokens)

    def _of(self, tenant: Tenant) -> _Usage:
        usage, quotas = self._usage.setdefault(tenant.name, _Usage()), tenant.quotas
        usage.minute = self._bucket(usage.minute, quotas.requests_per_minute, MINUTE)
        usage.day = self._bucket(usage.day, quotas.tokens_per_day, DAY)
        return usage

    def _bucket(self, bucket: Bucket | None, size: int | None, seconds: float) -> Bucket | None:
        if size is None:
            return None
        if bucket is None:
            return Bucket(size, seconds, self._clock)
        if bucket.size != size:
            bucket.resize(size)
        return bucket
