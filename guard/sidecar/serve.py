"""`serve`: checks everything, starts the engine, puts the sidecar in front, and stops both."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.markup import escape

from classifiers.detector import Detector
from guard.engine.launch import Engine, build_command, check_vllm_args, has_gpu
from guard.engine.session import EngineSettings
from guard.errors import UserError
from guard.policy import load_policy
from guard.runtime import GuardRuntime
from guard.sidecar.admin import Reloader, admin_token
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.feeder import Feeder
from guard.sidecar.model import ServedModel, find_model
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.parser import needs_special_text, reasoning_parser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.rules import RulesReader, Sources
from guard.sidecar.upstream import Upstream
from guard.store.store import beside
from guard.traces import Spool
from guard.weights import Registry, known_weights, weights_hash

_SHUTDOWN_SECONDS = 5


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
    vllm_args: tuple[str, ...] = ()
    keys: Path | None = None
    """File of keys; None: whoever reaches the port may ask."""
    admin_token_file: Path | None = None
    """Opens `POST /guard/admin/reload`; the environment can as well."""
    upstreams: tuple[str, ...] = ()
    """URLs of engines that run already; empty: `serve` starts one."""


@dataclass
class Prepared:
    """Checked parts, nothing started yet."""

    engine: Engine | None
    """None where the engines run already."""
    sidecar: Sidecar
    model: ServedModel
    feeder: Feeder


def prepare(settings: ServeSettings) -> Prepared:
    """Checks policy, arguments, model, detector and traces directory, and builds engine and sidecar from them."""
    policy = load_policy(settings.policy)
    check_vllm_args(settings.vllm_args)
    model = find_model(settings.model)
    runtime = GuardRuntime.build(policy, Detector.load(settings.detector), model.tokenizer, model.location, model.eos)
    traces = settings.traces.resolve()
    detectors = traces / "detectors"
    reader = RulesReader(Sources(settings.policy, settings.detector, settings.keys, detectors), runtime)
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
    feeder = Feeder(traces, settings.store or beside(traces), sidecar.metrics)
    feeder.open()
    return Prepared(engine, sidecar, model, feeder)


def serve(settings: ServeSettings, console: Console | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM; then nothing of the engine is left. UserError when the engine does not start."""
    console = console or Console(stderr=True)
    with bound(settings.host, settings.port) as listener, _stop_by_signal(), contextlib.suppress(KeyboardInterrupt):
        with console.status("Checking policy, detector and model"):
            parts = _prepare(settings)
        with parts.feeder, _running(parts.engine):
            _run(parts, listener, settings, console)
    console.print("Stopped.")


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
        if parts.feeder.problem is not None:
            console.print(f"The store is not fed yet: {parts.feeder.problem}", markup=False)

    def lost() -> None:
        status.stop()
        if not parts.sidecar.probe.proven:
            server.should_exit = True
        elif engine is not None:
            console.print(f"The engine has stopped; its log: {engine.log}", markup=False)

    app = create_app(parts.sidecar, on_ready=ready, on_lost=lost)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    )
    with status, _reload_by_signal(parts.sidecar.reloader):
        server.run(sockets=[listener])
    if engine is not None and not engine.alive and not parts.sidecar.probe.proven:
        raise UserError("The engine stopped while it was starting", got=engine.last_words(1), fix=f"Read {engine.log}")


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
            raise UserError(f"Cannot listen on {host}:{port}", got=reason, fix="Give another --port") from error
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
def _reload_by_signal(reloader: Reloader | None) -> Iterator[None]:
    """SIGHUP reloads, unless it comes because the terminal that `serve` was started at is gone: then `serve` ends."""
    had_terminal = has_terminal()

    def hang_up(number: int, frame: object) -> None:
        if reloader is None or (had_terminal and not has_terminal()):
            # uvicorn attends to this one, and lets requests end.
            signal.raise_signal(signal.SIGTERM)
        else:
            reloader.soon()

    before = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def has_terminal() -> bool:
    """Whether this process has a terminal that could be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


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
        with _signals(signal.SIG_IGN):
            engine.stop()


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[None]:
    """SIGTERM and a closed terminal end `serve` the way Ctrl-C does: through its clean-up."""
    with _signals(signal.default_int_handler):
        yield


@contextlib.contextmanager
def _signals(handler: object) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, handler) for number in numbers]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
