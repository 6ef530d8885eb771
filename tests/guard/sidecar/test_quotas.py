"""Quotas by exact numbers, on a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guard.keys import Quotas
from guard.sidecar.quotas import DAY, MINUTE, Bucket, Meter, OverQuota
from guard.sidecar.tenants import Tenant
from tests.guard import kit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tenant(name: str = "a", **quotas: int) -> Tenant:
    return Tenant(name, kit.runtime(), quotas=Quotas(**quotas))


def refused(meter: Meter, who: Tenant) -> tuple[str, int]:
    with pytest.raises(OverQuota) as caught:
        meter.enter(who)
    assert caught.value.response().headers["retry-after"] == str(caught.value.retry_after)
    return caught.value.message, caught.value.retry_after


def test_a_bucket_starts_full_fills_evenly_and_never_overflows(clock: Clock) -> None:
    bucket = Bucket(6, MINUTE, clock)
    bucket.take(6)
    assert (bucket.level, bucket.wait()) == (0.0, 10.0)
    clock.now += 25
    assert (bucket.level, bucket.wait()) == (2.5, 0.0)
    clock.now += 600
    assert bucket.level == 6
    bucket.take(9)
    assert (bucket.level, bucket.wait()) == (-3.0, 40.0)


def test_another_size_forgives_nothing(clock: Clock) -> None:
    bucket = Bucket(10, MINUTE, clock)
    bucket.take(4)
    bucket.resize(5)
    assert bucket.level == 1
    bucket.resize(2)
    assert bucket.level == -2


def test_requests_per_minute(clock: Clock) -> None:
    meter, who = Meter(clock), tenant(requests_per_minute=2)
    for _ in range(2):
        meter.enter(who)
        meter.leave(who)
    assert refused(meter, who) == ("This key's 2 requests per minute are used up.", 30)
    clock.now += 29
    assert refused(meter, who)[1] == 1
    clock.now += 1
    meter.enter(who)
    assert refused(meter, who)[1] == 30
    meter.enter(tenant("b", requests_per_minute=1))


def test_requests_at_the_same_time(clock: Clock) -> None:
    meter, who = Meter(clock), tenant(concurrent=2, requests_per_minute=9)
    meter.enter(who)
    meter.enter(who)
    assert refused(meter, who) == ("2 requests of this key are under way, which is its limit.", 1)
    meter.leave(who)
    meter.enter(who)
    # A refusal costs nothing.
    assert meter._usage["a"].minute is not None
    assert meter._usage["a"].minute.level == 6


def test_tokens_per_day_are_counted_afterwards(clock: Clock) -> None:
    meter, who = Meter(clock), tenant(tokens_per_day=1000)
    meter.enter(who)
    meter.charge("a", 1500)
    meter.charge("stranger", 10)
    assert refused(meter, who) == ("This key's 1000 tokens per day are used up.", 43287)
    clock.now += DAY / 2
    assert refused(meter, who)[1] == 87
    clock.now += 87
    meter.enter(who)


def test_a_reload_that_changes_quotas_keeps_what_was_used(clock: Clock) -> None:
    meter, who = Meter(clock), tenant(requests_per_minute=2, concurrent=5)
    meter.enter(who)
    meter.enter(who)
    more = replace(who, quotas=Quotas(requests_per_minute=3, concurrent=5))
    meter.enter(more)
    assert refused(meter, more)[0] == "This key's 3 requests per minute are used up."
    assert refused(meter, replace(who, quotas=Quotas(concurrent=3)))[0].startswith("3 requests of this key")
    meter.leave(more)
    meter.enter(replace(who, quotas=Quotas()))


def test_the_error_is_openais() -> None:
    assert OverQuota("No.", 0.2).body() == {
        "error": {"message": "No.", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"},
    }
    assert OverQuota("No.", 0.2).response().status_code == 429
