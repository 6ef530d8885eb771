"""`cli.py align pairs` and `align export`: from traces and prompts to preference pairs, on this machine or on many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from align.candidates import RolloutSettings
    from align.pairs import Pair
    from align.pipeline import Workbench


def _much(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="How much is tried", **limits)


def _where(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Where it runs", **limits)


def pairs(
    model: Annotated[str, typer.Option(help="Model directory or hub name; `demo` is the embedded demo reasoner.")],
    out: Annotated[Path, typer.Option(help="Directory of this run; an interrupted run on it goes on.")],
    traces: Annotated[str | None, typer.Option(help="What `serve` wrote: a directory, or Parquet on any path.")] = None,
    prompts: Annotated[str | None, typer.Option(help='Lines {"request", "tenant"} to sample, or Parquet.')] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy whose triggers and steps count.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of what is drawn.")] = 0,
    triggers: Annotated[int, _much("Triggers tried per cue (the paper: 6).", min=1)] = 1,
    rounds: Annotated[int, _much("Triggers in a row where a cue comes back.", min=1, max=16)] = 1,
    max_generations: Annotated[int, _much("Continuations per request (the paper: 14).", min=1)] = 14,
    max_tokens: Annotated[int, _much("Tokens per continuation.", min=1)] = 120,
    sample_tokens: Annotated[int, _much("Tokens of the first reply to a prompt.", min=1)] = 160,
    max_intervened: Annotated[int | None, _much("Sources with a cue, drawn; without --ray 160.", min=0)] = None,
    max_benign: Annotated[int | None, _much("Sources without a cue, drawn; without --ray 130.", min=0)] = None,
    per_request: Annotated[int, _much("Pairs of one request.", min=1)] = 4,
    per_tenant: Annotated[int | None, _much("Pairs of one tenant; by default any number.", min=1)] = None,
    context: Annotated[int, _where("Tokens the engine takes, prompt and continuation together.", min=64)] = 1024,
    endpoint: Annotated[list[str] | None, _where("A vLLM server of the same model; repeat it for more.")] = None,
    ray: Annotated[str | None, _where("Ray cluster: `local`, `auto` or `ray://HOST:PORT`.")] = None,
    ray_workers: Annotated[int, _where("Engines on the cluster.", min=1)] = 1,
) -> None:
    """Make preference pairs: cut a reasoning before its first cue, put a trigger there, continue, let the judge decide.

    Writes `OUT/pairs.jsonl` (token ids) and its card, `OUT/pairs.md` and `OUT/pairs.json`: what was dropped and why,
    generations per request, who judged. After an interruption run it again: what was generated is kept.

    From the traces of `serve`, one trigger each:

    `cli.py align pairs --traces traces/ --model demo --out runs/pairs`

    From prompts as in the paper (6 triggers, up to 2 in a row, at most 14 generations), on two running vLLM servers:

    `cli.py align pairs --prompts prompts.jsonl --model M --out runs/pairs --triggers 6 --rounds 2
    --endpoint http://a:8000 --endpoint http://b:8000`

    On a Ray cluster with eight engines:

    `cli.py align export --traces traces/ --out s3://bucket/traces.parquet`

    `cli.py align pairs --traces s3://bucket/traces.parquet --model M --out runs/pairs --ray auto --ray-workers 8`
    """
    from align.candidates import RolloutSettings
    from align.pairs import Quota
    from align.pipeline import AlignSettings, Workbench

    _check(traces, prompts, ray, endpoint, max_intervened, max_benign)
    limits = {"max_intervened": max_intervened, "max_benign": max_benign}
    drawn = {name: limit for name, limit in limits.items() if limit is not None}
    settings = RolloutSettings(
        triggers=triggers, rounds=rounds, max_generations=max_generations, max_tokens=max_tokens,
        sample_tokens=sample_tokens, quota=Quota(per_request=per_request, per_tenant=per_tenant), seed=seed, **drawn,
    )  # fmt: skip
    with Workbench.open(AlignSettings.of(model, policy, seed), out) as bench:
        bench.context = context
        if ray is None:
            found = _here(bench, settings, traces, prompts, endpoint or [])
        else:
            found = _on_ray(bench, settings.unlimited(), traces, prompts, ray, ray_workers)
    typer.echo(f"{len(found)} pairs in {out / 'pairs.jsonl'}; what was dropped and why: {out / 'pairs.md'}")


def export(
    out: Annotated[str, typer.Option(help="Parquet file on any fsspec path: `x.parquet`, `s3://bucket/x.parquet`.")],
    traces: Annotated[Path | None, typer.Option(help="Directory that `serve` writes traces to.")] = None,
    prompts: Annotated[str | None, typer.Option(help='JSON lines {"request", "tenant"}.')] = None,
) -> None:
    """Write traces or prompts as Parquet, where a cluster can read them.

    Example: `cli.py align export --traces traces/ --out s3://bucket/traces.parquet`
    """
    from align.tables import prompt_table, read_prompts, trace_table, write_table
    from guard.errors import UserError
    from guard.traces import read_traces

    if (traces is None) == (prompts is None):
        raise UserError("`align export` writes one kind of thing", fix="Give either --traces or --prompts")
    if traces is not None:
        found, report = read_traces(traces)
        table, malformed = trace_table(found), report.malformed
    else:
        table, malformed = prompt_table(read_prompts(str(prompts))), 0
    write_table(table, out)
    typer.echo(f"{table.num_rows} rows in {out}; {malformed} malformed lines skipped")


def _check(traces: str | None, prompts: str | None, ray: str | None, *local: object) -> None:
    from guard.errors import UserError

    if traces is None and prompts is None:
        raise UserError("`align pairs` has nothing to work on", fix="Give --traces, --prompts or both")
    if ray is not None and any(option not in (None, []) for option in local):
        raise UserError(
            "--ray brings its own engines and rolls out everything",
            fix="Leave out --endpoint, --max-intervened and --max-benign",
        )


def _here(
    bench: Workbench, settings: RolloutSettings, traces: str | None, prompts: str | None, endpoints: list[str]
) -> list[Pair]:
    from align import pipeline
    from align.endpoints import EndpointGenerator, EndpointSpec
    from align.tables import read_prompts

    backend = None
    if endpoints:
        encode = bench.tokenizer.backend_tokenizer.encode
        backend = EndpointGenerator(
            EndpointSpec(urls=tuple(endpoints)), lambda text: list(encode(text, add_special_tokens=False).ids)
        )
    rows = [] if traces is None else pipeline.collect(bench, traces)
    asked = [] if prompts is None else read_prompts(prompts)
    return pipeline.make_pairs(bench, rows, asked, settings, backend)


def _on_ray(
    bench: Workbench, settings: RolloutSettings, traces: str | None, prompts: str | None, address: str, workers: int
) -> list[Pair]:
    from align import pipeline
    from align.ray_run import RayOrder, harvest_on_ray

    order = RayOrder(address=address, traces=traces, prompts=prompts, workers=workers)
    return pipeline.pairs_of(bench, settings, lambda: harvest_on_ray(bench, order, settings))
