"""The files in `ops/`: what they start, where they ask, and that they agree with `serve` and with each other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import cli
from guard.sidecar.limits import BODY, DRAIN, SECONDS, STREAMS
from guard.sidecar.serve import ServeSettings

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
DEFAULTS = ServeSettings("m", Path("t"))
#: What stopping takes after the drain: uvicorn 5 s, the engine 10, the feeder 8 and 3.
AFTER_THE_DRAIN = 26
COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]


def options(command: str) -> set[str]:
    """The long options of a command of ours."""
    return {name for each in COMMANDS[command].params for name in each.opts if name.startswith("--")}


def given(arguments: list[str]) -> dict[str, str]:
    """`--name=value` or `--name value` by name."""
    found: dict[str, str] = {}
    words = iter([part for word in arguments for part in word.split("=", 1)])
    for word in words:
        if word.startswith("--"):
            found[word] = next(words)
    return found


def seconds(text: str) -> int:
    """`90s` in seconds."""
    return int(text.removesuffix("s"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((OPS / "compose.yaml").read_text())
    return read


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((OPS / "kubernetes" / "reasonguard.yaml").read_text())}


def test_the_command_line_has_the_defaults_that_serve_has() -> None:
    found = {each.name: each.default for each in COMMANDS["serve"].params}
    assert found["port"] == DEFAULTS.port == 8000
    assert (found["max_streams"], found["request_seconds"], found["drain_seconds"]) == (STREAMS, SECONDS, DRAIN)
    assert found["body_seconds"] == BODY
    assert found["engine_restarts"] == DEFAULTS.engine_restarts
    assert (found["log_format"], found["otel"]) == (DEFAULTS.log_format, DEFAULTS.otel) == ("text", False)


def test_compose_starts_a_server_a_database_and_the_loop(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"serve", "postgres", "align"}
    serve = services["serve"]
    assert serve["command"][0] == "serve"
    asked = given(serve["command"])
    assert set(asked) <= options("serve")
    assert asked["--port"] == str(DEFAULTS.port)
    assert serve["ports"] == [f"127.0.0.1:{DEFAULTS.port}:{DEFAULTS.port}"]
    assert asked["--store"] == "postgresql://reasonguard@postgres/traces"
    assert services["postgres"]["environment"]["POSTGRES_DB"] == "traces"
    assert services["postgres"]["environment"]["POSTGRES_USER"] == "reasonguard"
    assert seconds(serve["stop_grace_period"]) > float(asked["--drain-seconds"]) + AFTER_THE_DRAIN
    assert serve["environment"]["PGPASSWORD"] == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert {volume.split(":")[0] for volume in (*serve["volumes"], *services["postgres"]["volumes"])} == {
        *compose["volumes"], "../models",
    }  # fmt: skip


def test_compose_aligns_what_serve_writes(compose: dict[str, Any]) -> None:
    serve, align = compose["services"]["serve"], compose["services"]["align"]
    (script,) = align["command"]
    line = script.replace("\\\n", " ").split("cli.py", 1)[1].split("||")[0]
    words = shlex.split(re.sub(r"\$\$\([^)]*\)", "NOW", line))
    assert words[:2] == ["align", "--promote"]
    asked, served = given(words[2:]), given(serve["command"])
    assert set(asked) | {"--promote"} <= {name for each in COMMANDS["align"].params for name in each.opts}
    assert (asked["--traces"], asked["--versions"]) == (served["--traces"], served["--versions"])
    assert asked["--model"] == served["--model"]
    assert align["user"] == serve["user"]


def test_kubernetes_asks_the_routes_there_are_and_drains(kubernetes: dict[str, dict[str, Any]]) -> None:
    assert {name: each["apiVersion"] for name, each in kubernetes.items()} == {
        "Deployment": "apps/v1", "Service": "v1", "PodDisruptionBudget": "policy/v1",
    }  # fmt: skip
    pod = kubernetes["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert (
        labels
        == kubernetes["Deployment"]["spec"]["selector"]["matchLabels"]
        == kubernetes["Service"]["spec"]["selector"]
    )
    (container,) = pod["spec"]["containers"]
    assert container["args"][0] == "serve"
    asked = given(container["args"])
    assert set(asked) <= options("serve")
    assert container["ports"] == [{"name": "http", "containerPort": int(asked["--port"])}]
    assert int(asked["--port"]) == DEFAULTS.port
    (port,) = kubernetes["Service"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (DEFAULTS.port, "http")
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/ready", "liveness": "/health", "readiness": "/ready"}
    assert all(container[f"{name}Probe"]["httpGet"]["port"] == "http" for name in probes)
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace > wait + float(asked["--drain-seconds"]) + AFTER_THE_DRAIN
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["spec"]["volumes"]}


def test_the_unit_starts_serve_and_waits_for_its_drain() -> None:
    lines = [line.split("=", 1) for line in (OPS / "reasonguard.service").read_text().splitlines() if "=" in line]
    unit = {name: value for name, value in lines if not name.startswith("#")}
    words = shlex.split(unit["ExecStart"].split("cli.py", 1)[1])
    assert words[0] == "serve"
    asked = given([word for word in words[1:] if word != "$OPTIONS"])
    assert set(asked) <= options("serve")
    assert asked["--port"] == str(DEFAULTS.port)
    drain = re.search(r'"OPTIONS=--drain-seconds (\d+)"', unit["Environment"])
    assert drain is not None
    assert int(unit["TimeoutStopSec"]) > int(drain[1]) + AFTER_THE_DRAIN
    assert (unit["Restart"], unit["KillMode"], unit["NoNewPrivileges"]) == ("on-failure", "mixed", "yes")
    assert unit["StandardError"] == "journal"


def test_the_image_runs_serve_as_nobody_special() -> None:
    text = (OPS / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    found = {name: [rest for step, rest in steps if step == name] for name, _ in steps}
    assert found["FROM"] == ["python:3.11-slim"]
    assert found["USER"] == ["reasonguard"]
    assert found["EXPOSE"] == [str(DEFAULTS.port)]
    assert f"127.0.0.1:{DEFAULTS.port}/health" in found["HEALTHCHECK"][0]
    assert json.loads(found["ENTRYPOINT"][0]) == ["tini", "--", "python", "/app/cli.py"]
    command = json.loads(found["CMD"][0])
    assert command[0] == "serve"
    assert set(given(command[1:])) <= options("serve")
    for copied in found["COPY"]:
        assert all((ROOT / source).exists() for source in copied.split()[:-1])
    ignored = (OPS / "Dockerfile.dockerignore").read_text().splitlines()
    assert {source for copied in found["COPY"] for source in copied.split()[:-1]} == {
        line.removeprefix("!") for line in ignored if line.startswith("!")
    }
    assert [name for name, _ in steps].index("USER") < [name for name, _ in steps].index("ENTRYPOINT")
    assert "index-url" not in text
