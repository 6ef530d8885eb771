"""Spans and log lines of real requests: what they say, and that nothing of a request's content is in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from guard.sidecar import logs, tracing
from guard.sidecar.limits import Limits
from guard.sidecar.metrics import Metrics
from tests.guard.sidecar import test_sidecar
from tests.guard.sidecar.scripted import trace_of
from tests.guard.sidecar.test_sidecar import Front, Start

start = test_sidecar.start
SECRET = "my-very-own-question"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": f"Bearer {SECRET}"}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.set_up(exporter)
    yield exporter
    tracing.shut_down()


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """JSON lines of the requests' logger, as `serve --log-format json` formats them."""
    found: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(logs.JsonFormatter().format(record)))

    logger, handler = logging.getLogger("guard.sidecar.observe"), Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    """A span ends after its response's last byte has been read here."""
    test_sidecar._until(lambda: bool(spans.get_finished_spans()))
    (span,) = spans.get_finished_spans()
    return span


def test_a_request_is_one_span_between_the_clients_and_the_engines(start: Start, spans: InMemorySpanExporter) -> None:
    front = start()
    response = front.http.post("/v1/chat/completions", json=ASK, headers=HEADERS)
    span = only(spans)
    assert (span.name, span.kind) == ("POST /v1/chat/completions", SpanKind.SERVER)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert front.engine.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "reasonguard.result": "guarded", "reasonguard.guard_id": response.headers["x-reasonguard-id"],
        "reasonguard.guarded": True, "reasonguard.seen": 1, "reasonguard.unscored": 0, "reasonguard.interventions": 0,
        "reasonguard.unanswered": 0, "reasonguard.mode": "inject", "reasonguard.policy": "default",
        "reasonguard.policy_hash": front.policy.hash,
    }  # fmt: skip


def test_a_stream_that_fails_says_so_in_its_span(start: Start, spans: InMemorySpanExporter) -> None:
    front = start(lambda i, p: [trace_of(i, p, errors=[f"observe: {SECRET}"])])
    front.events()
    attributes = dict(only(spans).attributes or {})
    assert (attributes["reasonguard.result"], attributes["reasonguard.guarded"]) == ("unproven", False)
    assert SECRET not in only(spans).to_json()


def test_without_tracing_the_engine_is_told_nothing(start: Start) -> None:
    front = start()
    front.http.post("/v1/chat/completions", json=ASK, headers=HEADERS)
    assert "traceparent" not in front.engine.headers


def test_a_path_that_is_no_route_is_not_repeated(
    start: Start, spans: InMemorySpanExporter, lines: list[dict[str, Any]]
) -> None:
    front = start()
    assert front.http.post(f"/v1/{SECRET}", json=ASK).status_code == 404
    test_sidecar._until(lambda: bool(lines))
    assert (only(spans).name, lines[0]["route"], lines[0]["status"]) == ("POST other", "other", 404)
    assert SECRET not in only(spans).to_json()
    assert SECRET not in json.dumps(lines)


def test_a_log_line_names_the_end_and_the_policy(start: Start, lines: list[dict[str, Any]]) -> None:
    front = start()
    response = front.http.post("/v1/chat/completions", json=ASK, headers=HEADERS)
    front.http.post("/v1/chat/completions", json={**ASK, "logit_bias": {"1": 1}})
    front.sidecar.limits = Limits(Metrics(), streams=1)
    with front.sidecar.limits.one_more():
        front.http.post("/v1/chat/completions", json=ASK)
    test_sidecar._until(lambda: len(lines) == 3)
    assert SECRET not in json.dumps(lines)
    policy = {"policy": "default", "mode": "inject"}
    base = {"level": "info", "logger": "guard.sidecar.observe", "message": "request", "event": "request"}
    wanted: list[dict[str, Any]] = [
        {**policy, "status": 200, "result": "guarded", "guard_id": response.headers["x-reasonguard-id"],
         "policy_hash": front.policy.hash},
        {**policy, "status": 400, "result": "refused"},
        {"status": 503, "result": "turned_away"},
    ]  # fmt: skip
    for line in lines:
        assert line.pop("seconds") >= 0
        assert line.pop("time").endswith("Z")
    assert lines == [{**base, "route": "/v1/chat/completions", **each} for each in wanted]


def test_spans_reach_a_collector_over_otlp(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter that `serve` uses, against a real HTTP server."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from tests.guard.sidecar.conftest import running

    got: list[bytes] = []

    async def take(request: Request) -> Response:
        got.append(await request.body())
        return Response()

    with running(Starlette(routes=[Route("/v1/traces", take, methods=["POST"])])) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        assert tracing.wanted()
        tracing.set_up()
        try:
            asked: Front = start()
            asked.http.post("/v1/chat/completions", json=ASK)
            test_sidecar._until(lambda: bool(got))
        finally:
            tracing.shut_down()
    assert b"POST /v1/chat/completions" in got[0]
    assert b"service.name" in got[0]
    assert SECRET.encode() not in got[0]


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter("%(message)s")])
def test_an_exception_is_logged_without_its_words(formatter: logging.Formatter) -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError(f"{SECRET} again") from error
    except RuntimeError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "p", 1, "it broke", (), (RuntimeError, error, error.__traceback__)
        )
    said = formatter.format(record)
    assert SECRET not in said
    assert "RuntimeError" in said
    assert "ValueError" in said
    assert "test_observe.py:" in said


def test_json_lines_carry_only_fields_from_the_list() -> None:
    record = logging.LogRecord("x", logging.WARNING, "p", 1, "a \u2028 %s", ("b",), None)
    record.status, record.authorization = 200, SECRET
    line = logs.JsonFormatter().format(record)
    assert line.isascii()
    read = json.loads(line)
    assert (read["message"], read["status"], read["level"]) == ("a \u2028 b", 200, "warning")
    assert set(read) == {"time", "level", "logger", "message", "status"}


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from guard.errors import UserError

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"OpenTelemetry is not installed; got .*\. Install the extra `otel`\.$"):
        tracing.set_up()
