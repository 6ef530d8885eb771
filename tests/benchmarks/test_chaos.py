"""The chaos rig: what it counts, and that it counts nothing against a real `serve` whose engine is scripted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.progress import Progress

from benchmarks.chaos import Rig, full_disk, killing, report, traffic
from benchmarks.chaos_load import MALFORMED, Findings, Plan, Reply, plans, send
from benchmarks.chaos_serve import Lost, _sum
from guard.policy import Policy
from tests.benchmarks.scripted_serve import ENGINE
from tests.guard.sidecar.scripted import trace_of

POLICY = Policy()


def test_a_real_serve_survives_kills_drains_and_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: chaos\n")
    script = ("-m", "tests.benchmarks.scripted_serve")
    rig = Rig(str(tiny_model), tmp_path, ("--policy", str(policy)), 7, Progress(disable=True), script, ENGINE)
    traffic(rig, 80, 1)
    disk = full_disk(rig, 24)
    killing(rig, 1)
    found = report(rig, disk, "test")
    log = "\n".join(path.read_text() for path in tmp_path.glob("*/serve.log"))
    assert found["broken"] == [], log
    assert (found["engine_kills"], found["kills"]) == (1, 1)
    ends = found["ends"]
    assert ends["unary: whole"] > 0
    assert ends["stream: whole"] > 0
    assert ends["leaves: left"] > 0
    assert ends["malformed: refused"] > 0
    assert found["requests"] >= 80
    if "skipped" not in disk:
        assert disk["withheld_while_full"] > 0
        assert disk["whole_after"] > 0


def receipt(guard_id: str, **changes: Any) -> dict[str, Any]:
    clean = {"guard_id": guard_id, "guarded": True, "seen": 1, "scored": 1, "interventions": 0}
    return {**clean, "policy_hash": POLICY.hash, **changes}


@pytest.mark.parametrize(("reply", "field"), [
    (Reply("unary", "whole", 200, receipt("lost")), "traces_lost"),
    (Reply("unary", "whole", 200, receipt("kept", seen=2)), "traces_lost"),
    (Reply("stream", "whole", 200, receipt("kept", interventions=1)), "traces_lost"),
    (Reply("stream", "whole", 200, receipt("kept", guarded=False)), "unguarded_responses"),
    (Reply("unary", "whole", 200), "missing_receipts"),
    (Reply("leaves", "hang"), "hangs"),
    (Reply("unary", "error", 500), "internal_errors"),
    (Reply("malformed", "error", 502), "malformed_accepted"),
    (Reply("malformed", "broken"), "malformed_accepted"),
])  # fmt: skip
def test_every_break_is_counted_once(reply: Reply, field: str) -> None:
    found = Findings()
    found.judge([reply], [trace_of("kept", POLICY)])
    counts = {name: value for name, value in vars(found).items() if name != "ends"}
    assert counts == {name: int(name == field) for name in counts}


@pytest.mark.parametrize("reply", [
    Reply("unary", "whole", 200, receipt("kept")), Reply("stream", "error", 200, receipt("kept", guarded=False)),
    Reply("leaves", "left"), Reply("stream", "broken", 200), Reply("unary", "unavailable", 503),
    Reply("malformed", "refused", 413), Reply("unary", "error", 502, receipt("x", guarded=False)),
])  # fmt: skip
def test_what_is_allowed_is_not_counted(reply: Reply) -> None:
    found = Findings()
    found.judge([reply], [trace_of("kept", POLICY)])
    assert {value for name, value in vars(found).items() if name != "ends"} == {0}
    assert found.ends == {f"{reply.kind}: {reply.end}": 1}


def test_the_same_seed_makes_the_same_requests() -> None:
    made = plans(300, 3)
    assert made == plans(300, 3) != plans(300, 4)
    kinds = {kind: sum(plan.kind == kind for plan in made) for kind in ("unary", "stream", "leaves", "malformed")}
    assert sum(kinds.values()) == 300
    assert min(kinds.values()) > 10
    assert {plan.body for plan in made if plan.kind == "malformed"} == set(MALFORMED)


def answered(response: httpx.Response, *, stream: bool = False) -> Reply:
    """What `send` makes of one answer."""

    async def go() -> Reply:
        transport = httpx.MockTransport(lambda _: response)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await send(http, Plan("stream" if stream else "unary", b"{}", stream))

    return asyncio.run(go())


def events(*data: Any, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(each)}\n\n" for each in data] + (["data: [DONE]\n\n"] if done else [])
    return httpx.Response(200, stream=httpx.ByteStream("".join(lines).encode()))


def test_only_what_ended_well_is_whole() -> None:
    last = {"choices": [], "reasonguard": receipt("a")}
    assert answered(events({"choices": [1]}, last), stream=True) == Reply("stream", "whole", 200, receipt("a"))
    assert answered(events(last, done=False), stream=True) == Reply("stream", "broken", 200)
    assert answered(events({**last, "error": {}}), stream=True) == Reply("stream", "error", 200, receipt("a"))
    assert answered(httpx.Response(200, json={"reasonguard": receipt("a")})) == Reply(
        "unary", "whole", 200, receipt("a")
    )
    assert answered(httpx.Response(200, content=b'{"cut')) == Reply("unary", "broken", 200)
    header = {"x-reasonguard-receipt": json.dumps(receipt("a"))}
    assert answered(httpx.Response(502, json={}, headers=header)) == Reply("unary", "error", 502, receipt("a"))
    assert [answered(httpx.Response(status, json={})).end for status in (503, 413)] == ["unavailable", "refused"]


def test_a_gauge_that_is_missing_is_no_zero() -> None:
    page = 'a{engine="0"} 2.0\na{engine="1"} 1.0\nb 0.0\n'
    assert _sum(page, ("a", "b")) == 3
    with pytest.raises(Lost, match="lacks c"):
        _sum(page, ("a", "c"))
