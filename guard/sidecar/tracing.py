"""OpenTelemetry spans: one for each request, passed on to the engine. Off unless `serve` sets it up; never content.

The engine makes its own spans under them when it is started with vLLM's `--otlp-traces-endpoint`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from guard.errors import UserError

if TYPE_CHECKING:
    import httpx
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

ENDPOINT = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE = "reasonguard"
Value = str | int | float | bool
_tracer: Tracer | None = None


def wanted() -> bool:
    """Whether the environment names where spans go to."""
    return any(os.environ.get(name) for name in ENDPOINT)


def set_up(exporter: SpanExporter | None = None) -> None:
    """From now on spans are sent, in batches and beside the requests; by default over OTLP as the environment says.

    UserError where OpenTelemetry is not installed.
    """
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    except ImportError as error:
        raise UserError(
            "Spans were asked for, and OpenTelemetry is not installed", got=str(error), fix="Install the extra `otel`"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)}))
    made = BatchSpanProcessor(OTLPSpanExporter()) if exporter is None else SimpleSpanProcessor(exporter)
    provider.add_span_processor(made)
    _tracer = provider.get_tracer("guard.sidecar")


def shut_down() -> None:
    """Ends tracing in this process; what is not sent yet stays unsent."""
    global _tracer
    _tracer = None


@contextlib.contextmanager
def request_span(method: str, route: str, headers: Mapping[str, str]) -> Iterator[Span | None]:
    """The span of one request, under the client's where it names one (`traceparent`); None while tracing is off."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    above = TraceContextTextMapPropagator().extract(carrier)
    attributes = {"http.request.method": method, "http.route": route}
    # What an exception says can quote content.
    with _tracer.start_as_current_span(
        f"{method} {route}", above, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span


def note(**attributes: Value | None) -> None:
    """Sets `reasonguard.*` attributes of the request's span."""
    if _tracer is None:
        return
    from opentelemetry.trace import get_current_span

    found = {f"reasonguard.{name}": value for name, value in attributes.items() if value is not None}
    get_current_span().set_attributes(found)


def trace_id() -> str | None:
    """The current trace's id in hex; None while tracing is off."""
    if _tracer is None:
        return None
    from opentelemetry.trace import format_trace_id, get_current_span

    return format_trace_id(get_current_span().get_span_context().trace_id)


async def pass_on(request: httpx.Request) -> None:
    """An httpx hook: the engine's spans lie under ours."""
    if _tracer is None:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    TraceContextTextMapPropagator().inject(request.headers)
