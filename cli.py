"""The command line: serve, its keys and reviewers, align, csr, triggers, classifier, traces, replay, doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from align.cli import app as align_app
from align.csr_cli import csr, triggers_app
from classifiers.cli import app as classifier_app
from guard.cli import app as traces_app
from guard.doctor import doctor
from guard.errors import UserError
from guard.keys_cli import app as keys_app
from guard.replay_cli import replay
from guard.sidecar.pages.cli import app as reviewers_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Watch a reasoning model think, correct it at the first harmful step, and train the correction in.",
)
app.add_typer(align_app, name="align")
app.add_typer(triggers_app, name="triggers")
app.add_typer(classifier_app, name="classifier")
app.add_typer(traces_app, name="traces")
app.add_typer(keys_app, name="keys")
app.add_typer(reviewers_app, name="reviewers")
app.command()(csr)
app.command()(replay)
app.command()(doctor)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Model directory, hub name, or `demo` for the embedded model.")],
    policy: Annotated[Path | None, typer.Option(help="Policy file (YAML); by default the built-in policy.")] = None,
    detector: Annotated[Path | None, typer.Option(help="Detector directory; by default the packaged one.")] = None,
    canary: Annotated[
        Path | None, typer.Option(help="New detector that decides nothing: compared with the one in force, live.")
    ] = None,
    canary_percent: Annotated[
        float, typer.Option(min=0, max=100, help="Of how many requests in a hundred --canary sees the steps.")
    ] = 10,
    traces: Annotated[Path, typer.Option(help="Directory for traces and the engine's log.")] = Path("runs/traces"),
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="SQLite or Postgres that traces go to; by default SQLite beside them."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    versions: Annotated[
        Path | None, typer.Option(help="Registry that `align promote` writes: its version in force is served.")
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Engine that runs already (repeatable): cues are substituted."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of keys (`keys add`): who may ask, under which policy and quotas.")
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(help="Token for POST /guard/admin/reload; by default REASONGUARD_ADMIN_TOKEN, or no such route."),
    ] = None,
    reviewers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Turn on the review pages at /guard/ for those whom `reviewers add` wrote here."
        ),
    ] = None,
    completions: Annotated[bool, typer.Option("--completions", help="Serve /v1/completions: raw prompts.")] = False,
    max_streams: Annotated[int, typer.Option(min=0, help="Requests under way at most; 0: any number.")] = 512,
    request_seconds: Annotated[float, typer.Option(min=0, help="Longest time for one request; 0: any.")] = 1800,
    body_seconds: Annotated[float, typer.Option(min=0, help="Longest time for a request's body; 0: any.")] = 30,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time for requests under way after SIGTERM.")] = 30,
    engine_restarts: Annotated[int, typer.Option(min=0, help="Starts of a dying engine, in a row.")] = 5,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Of what goes to standard error.")] = "text",
    otel: Annotated[bool, typer.Option("--otel", help="Send OpenTelemetry spans over OTLP (extra `otel`).")] = False,
    vllm_args: Annotated[list[str] | None, typer.Argument(metavar="-- [VLLM ARGS]", help="Passed to vLLM.")] = None,
) -> None:
    """Serve a model under guard: an OpenAI-compatible API whose responses carry receipts.

    Examples:

    cli.py serve --model demo

    cli.py serve --model ./my-model --policy policy.yaml --port 9000 -- --max-model-len 8192

    cli.py serve --model ./my-model --versions runs/versions

    cli.py serve --model ./my-model --upstream http://10.0.0.7:8000 --upstream http://10.0.0.8:8000

    cli.py serve --model ./my-model --keys keys.yaml --host 0.0.0.0

    cli.py serve --model ./my-model --reviewers runs/reviewers.json --canary runs/detector --canary-percent 20
    """
    from guard.sidecar.serve import ServeSettings
    from guard.sidecar.serve import serve as run

    run(
        ServeSettings(
            model, traces, policy, detector, host, port, store, versions, vllm_args=tuple(vllm_args or ()), keys=keys,
            admin_token_file=admin_token_file, reviewers=reviewers, max_streams=max_streams,
            request_seconds=request_seconds, body_seconds=body_seconds, drain_seconds=drain_seconds,
            engine_restarts=engine_restarts, log_format=log_format, otel=otel, completions=completions,
            upstreams=tuple(upstream or ()), canary=canary, canary_percent=canary_percent,
        )
    )  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report and everything behind it.")] = Path("runs/demo"),
) -> None:
    """Run the whole loop on the embedded model and write report.html and report.json.

    Example: cli.py demo --out runs/demo
    """
    from demo.run import main as run

    run(out)


def main() -> None:
    """Runs the command line; a UserError is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
