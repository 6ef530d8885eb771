"""`serve`: checks everything, starts the engine, puts the sidecar in front, and stops both."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from starlette.types import ASGIApp

from classifiers.detector import Detector
from guard.engine.launch import Engine, build_command, check_vllm_args, has_gpu
from guard.engine.settings import EngineSettings
from guard.errors import UserError
from guard.policy import load_policy
from guard.runtime import GuardRuntime
from guard.sidecar import logs, tracing
from guard.sidecar.admin import Reloader, admin_token
from guard.sidecar.app import create_app
from guard.sidecar.canary import PERCENT
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.feeder import Feeder
from guard.sidecar.keeper import RESTARTS, Keeper
from guard.sidecar.limits import BODY, DRAIN, SECONDS, STREAMS, Limits
from guard.sidecar.metrics import Metrics
from guard.sidecar.model import ServedModel, find_model
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.pages.app import create_pages
from guard.sidecar.pages.reviewers import Reviewers
from guard.sidecar.pages.site import ROOT, Site
from guard.sidecar.parser import needs_special_text, reasoning_parser
from guard.sidecar.probe import Probe
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.rules import RulesReader, Sources
from guard.sidecar.server import Server, open_many_files, settle
from guard.sidecar.signals import handled, reload_by_signal, stop_by_signal
from guard.sidecar.upstream import Upstream
from guard.store.store import beside
from guard.traces import Spool
from guard.weights import Registry, known_weights, weights_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeSettings:
    """What the user asked `serve` for."""

    model: str
    traces: Path
    policy: Path | None = None
    detector: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    store: str | None = None
    """URL of the database that the spool feeds; None: SQLite in the traces directory."""
    versions: Path | None = None
    """Registry whose version in force is loaded, and followed."""
    reviewers: Path | None = None
    """Who may open the review pages; None: there are no pages."""
    vllm_args: tuple[str, ...] = ()
    keys: Path | None = None
    """File of keys; None: whoever reaches the port may ask."""
    admin_token_file: Path | None = None
    """Opens `POST /guard/admin/reload`; the environment can as well."""
    max_streams: int = STREAMS
    """Requests under way at most; 0: any number."""
    request_seconds: float = SECONDS
    """That one request may take; 0: any time."""
    body_seconds: float = BODY
    """That its body may take; 0: any time."""
    drain_seconds: float = DRAIN
    """That requests under way get after SIGTERM."""
    engine_restarts: int = RESTARTS
    """How many deaths of the engine in a row are answered with another start."""
    log_format: logs.Format = "text"
    otel: bool = False
    """Send spans; the environment's `OTEL_EXPORTER_OTLP_ENDPOINT` asks for it too."""
    completions: bool = False
    """Serve `/v1/completions` too."""
    upstreams: tuple[str, ...] = ()
    """URLs of engines that run already; empty: `serve` starts one."""
    canary: Path | None = None
    """A new detector that is compared with the one in force, and decides nothing; None: there is none."""
    canary_percent: float = PERCENT
    """Of how many requests in a hundred it sees the steps."""

    def limits(self, metrics: Metrics) -> Limits:
        """The sidecar's, as asked for."""
        return Limits(metrics, self.max_streams, self.request_seconds, self.body_seconds)


@dataclass
class Prepared:
    """Checked parts, nothing started yet."""

    engine: Engine | None
    """None where the engines run already."""
    sidecar: Sidecar
    model: ServedModel
    feeder: Feeder
    pages: ASGIApp | None
    """The review pages."""


def prepare(settings: ServeSettings) -> Prepared:
    """Checks policy, arguments, model, detector and traces directory, and builds engine and sidecar from them."""
    policy = load_policy(settings.policy)
    check_vllm_args(settings.vllm_args)
    model = find_model(settings.model)
    runtime = GuardRuntime.build(policy, Detector.load(settings.detector), model.tokenizer, model.location, model.eos)
    traces = settings.traces.resolve()
    detectors = traces / "detectors"
    reader = RulesReader(
        Sources(settings.policy, settings.detector, settings.keys, detectors, settings.canary, settings.canary_percent),
        runtime,
    )
    rules, token = reader.read(), admin_token(settings.admin_token_file)
    spool = Spool(traces)
    secret = secrets.token_urlsafe(32)
    command = build_command(
        model.location,
        EngineSettings(
            policy=settings.policy.resolve() if settings.policy else None,
            detector=settings.detector.resolve() if settings.detector else None,
            detectors=detectors,
            spool=traces,
            secret=secret,
        ),
        served_name=model.name,
        parser=reasoning_parser(model),
        context=model.context,
        vllm_args=settings.vllm_args,
        reloads=settings.versions is not None,
    )
    weights = weights_hash(model.location)
    if settings.versions is not None:
        weights = known_weights(model.location, "--versions")
    engine = Engine(command, traces / f"engine-{time.strftime('%Y%m%d-%H%M%S')}.log")
    sidecar = build_sidecar(
        runtime,
        Neutraliser(model.tokenizer),
        Upstream(command.url, command.api_key),
        SpoolFollower(traces),
        secret=secret,
        alive=lambda: engine.alive,
        spool=spool,
        served_name=model.name,
        allow_seed=has_gpu(),
        keep_special=needs_special_text(model),
        registry=None if settings.versions is None else Registry(settings.versions),
        weights=weights,
    )
    sidecar.adopt(rules)
    sidecar.reloader = Reloader(sidecar, reader, token)
    sidecar.completions = settings.completions
    sidecar.limits = settings.limits(sidecar.metrics)
    if isinstance(sidecar.probe, Probe):
        sidecar.keeper = Keeper(engine, sidecar.probe, sidecar.versions, sidecar.metrics, settings.engine_restarts)
    feeder = Feeder(traces, settings.store or beside(traces), sidecar.metrics)
    feeder.open()
    return Prepared(engine, sidecar, model, feeder, review_pages(settings, sidecar, model))


def review_pages(settings: ServeSettings, sidecar: Sidecar, model: ServedModel) -> ASGIApp | None:
    """The review pages, where reviewers are named; UserError when their file cannot be read."""
    if settings.reviewers is None:
        return None
    reviewers = Reviewers(settings.reviewers)
    reviewers.hashes()
    registry = None if settings.versions is None else Registry(settings.versions)
    return create_pages(
        Site(sidecar, settings.store or beside(settings.traces.resolve()), model.tokenizer, registry), reviewers
    )


def serve(settings: ServeSettings, console: Console | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM (which lets requests end first); then nothing of the engine is left.

    UserError when the engine does not start, or has died too often."""
    logs.set_up(settings.log_format)
    open_many_files()
    # As JSON, nothing but JSON goes to standard error.
    console = console or Console(stderr=True, quiet=settings.log_format == "json")
    if settings.otel or tracing.wanted():
        tracing.set_up()
    with bound(settings.host, settings.port) as listener, stop_by_signal(), contextlib.suppress(KeyboardInterrupt):
        with console.status("Checking policy, detector and model"):
            parts = _prepare(settings)
        with parts.feeder, _running(parts.engine):
            _run(parts, listener, settings, console)
    console.print("Stopped.")
    log.info("stopped", extra={"event": "stopped"})


def _prepare(settings: ServeSettings) -> Prepared:
    if not settings.upstreams:
        return prepare(settings)
    from guard.sidecar.remote import prepare_remote

    return prepare_remote(settings)


def _run(parts: Prepared, listener: socket.socket, settings: ServeSettings, console: Console) -> None:
    engine = parts.engine
    waiting = "Proving the substitution on each upstream"
    if engine is not None:
        waiting = f"Starting the engine (about a minute); its log: {escape(str(engine.log))}"
    status = console.status(waiting)

    def ready() -> None:
        status.stop()
        settle()
        policy, port = parts.sidecar.policy, listener.getsockname()[1]
        console.print(f"Ready: http://{settings.host}:{port}/v1 serves {parts.model.name}", markup=False)
        console.print(f"Policy {policy.name} {policy.hash}; traces in {settings.traces}", markup=False)
        if parts.sidecar.upstreams is not None:
            states = ", ".join(f"{n} {state}" for n, state in parts.sidecar.upstreams.states.items())
            console.print(f"Substitution only: the upstreams have no guard of their own ({states})", markup=False)
        if parts.sidecar.keys is None and not is_loopback(settings.host):
            console.print(
                f"Warning: whoever reaches {settings.host}:{port} may ask: give --keys FILE, or put a gateway in front",
                markup=False, style="bold red",
            )  # fmt: skip
        about = {"policy": policy.name, "policy_hash": policy.hash, "mode": policy.mode, "model": parts.model.name}
        log.info("ready", extra={"event": "ready", "url": f"http://{settings.host}:{port}/v1", **about})
        if parts.feeder.problem is not None:
            console.print(f"The store is not fed yet: {parts.feeder.problem}", markup=False)
        where = "off; `cli.py reviewers add NAME` and --reviewers FILE turn them on"
        on = f"http://{settings.host}:{port}{ROOT}/"
        console.print(f"Review pages: {where if parts.pages is None else on}", markup=False)

    def lost() -> None:
        status.stop()
        server.lost = server.should_exit = True

    app = create_app(parts.sidecar, on_ready=ready, on_lost=lost, pages=parts.pages)
    server = Server(app, parts.sidecar.limits, settings.drain_seconds)
    with status, reload_by_signal(parts.sidecar.reloader):
        server.run(sockets=[listener])
    if server.lost and engine is not None:
        served = parts.sidecar.keeper is not None and parts.sidecar.keeper.served
        what = "and is not started again" if served else "while it was starting"
        raise UserError(f"The engine stopped {what}", got=engine.last_words(1), fix=f"Read {engine.log}")


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """The listening socket, taken before anything starts; UserError when the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            # A name that nobody knows, or an address of another machine.
            odd = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
            fix = "Give another --host" if odd else "Give another --port"
            raise UserError(f"Cannot listen on {host}:{port}", got=reason, fix=fix) from error
        yield listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _running(engine: Engine | None) -> Iterator[None]:
    if engine is None:
        yield
        return
    try:
        engine.start()
        yield
    finally:
        # A second Ctrl-C must not leave workers behind.
        with handled(signal.SIG_IGN):
            engine.stop()
