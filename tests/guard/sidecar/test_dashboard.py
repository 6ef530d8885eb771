"""The Grafana dashboard asks for nothing that /metrics does not have, and leaves nothing of it out."""

from __future__ import annotations

import json
import re
from pathlib import Path

from guard.sidecar.metrics import Metrics
from guard.traces import Intervention
from tests.guard.sidecar import test_sidecar
from tests.guard.sidecar.scripted import trace_of
from tests.guard.sidecar.test_sidecar import HELLO, Start

DASHBOARD = Path(__file__).parents[3] / "ops" / "grafana" / "reasonguard.json"
start = test_sidecar.start


def test_every_query_of_the_dashboard_names_what_metrics_has(start: Start) -> None:
    done = Intervention(step=0, at=0, trigger_id="danger", score=0.9, forced=1, completed=True)
    front = start(lambda i, p: [trace_of(i, p, interventions=[done], injected_tokens=1)])
    front.http.post("/v1/chat/completions", json=HELLO)
    front.sidecar.metrics.turned_away.labels("time").inc()
    front.sidecar.metrics.version_loads.labels("loaded").inc()
    front.sidecar.metrics.reloads.labels("loaded").inc()
    front.sidecar.metrics.upstream_up.labels("1").set(1)
    front.sidecar.metrics.upstream_in_flight.labels("1").set(0)
    front.sidecar.metrics.canary_requests.labels("c", "default", "inject", "same").inc()
    front.sidecar.metrics.canary_steps.labels("c").inc()
    front.sidecar.metrics.canary_left_out.labels("c", "dropped").inc()
    labels: dict[str, set[str]] = {}
    for line in front.http.get("/metrics").text.splitlines():
        if sample := re.match(r"(reasonguard_\w+)(?:\{(.*)\})? ", line):
            labels.setdefault(sample[1], set()).update(re.findall(r'(\w+)="', sample[2] or ""))
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert len(queries) > 20
    for query in queries:
        named = re.findall(r"(reasonguard_\w+)(?:\{([^}]*)\})?", query)
        assert named, query
        for metric, selector in named:
            assert metric in labels, query
            assert set(re.findall(r"(\w+)=~?", selector)) <= labels[metric], query
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        assert grouped <= {"instance"}.union(*(labels[metric] for metric, _ in named)), query
    used = {metric for query in queries for metric in re.findall(r"reasonguard_\w+", query)}
    families = {family.name for family in Metrics().registry.collect()}
    assert {name for name in families if not any(metric.startswith(name) for metric in used)} == set()
