"""The suite on our own sidecar, where nothing may fail, and on an engine without one, where the guard's part must."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from tests.conformance.gateway import Gateway
from tests.conformance.guarding import OPT_OUTS
from tests.conformance.run import GROUPS, results, table
from tests.guard.sidecar.fronts import RemoteFront
from tests.guard.sidecar.scripted import ScriptedEngine
from tests.guard.sidecar.serving import running

KEY = {"authorization": "Bearer key"}
STOP = (
    "`stop`: stop strings are found by the engine, in text that may be taken back, and the engine has no guard of its "
    "own that could inject instead."
)


OFF = "/v1/completions is off: ask /v1/chat/completions, or start `serve` with --completions."
COMPLETIONS = ("completions_answer", "completions_stream", "completions_cannot_opt_out")


@pytest.mark.parametrize("completions", [True, False])
def test_our_sidecar_conforms(remotes: Callable[..., RemoteFront], completions: bool) -> None:
    front = remotes(1)
    front.sidecar.completions = completions
    found = results(Gateway(front.http, max_body=3 * 1024 * 1024))
    assert [each for each in found if each.outcome == "fail"] == []
    skipped = {each.name: each.note for each in found if each.outcome == "skip"}
    assert skipped == {
        "stop_ends_the_output": STOP,
        "tools_pass_or_are_refused": "`tools` is refused: tool calls are not watched yet.",
        **({} if completions else dict.fromkeys(COMPLETIONS, OFF)),
    }
    assert len(found) == len(GROUPS["openai"]) + len(GROUPS["guard"]) >= 50


def test_an_open_engine_fails_every_check_of_the_firewall(tmp_path: Path) -> None:
    engine = ScriptedEngine(tmp_path, lambda _: [])
    engine.hold.set()
    with running(engine.app()) as url, httpx.Client(base_url=url, trust_env=False, headers=KEY) as http:
        found = {each.name: each for each in results(Gateway(http), ["guard"])}
    assert {name for name, each in found.items() if each.outcome == "fail"} >= {
        "receipt_in_header_and_body", "receipt_names_what_was_watched", "receipt_in_the_last_event",
        *(f"refuses_{name}" for name in OPT_OUTS),
    }  # fmt: skip
    assert found["refuses_n"].note.startswith("HTTP 200")
    assert found["receipt_in_header_and_body"].note == "no header x-reasonguard-receipt"
    shown = StringIO()
    Console(file=shown, width=200).print(table(list(found.values())))
    assert "refuses_logit_bias" in shown.getvalue()
