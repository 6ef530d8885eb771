"""The same rollouts on a real Ray cluster of two workers, each with a vLLM engine of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.candidates import RolloutSettings, one_by_one
from align.pairs import Quota
from align.pipeline import Workbench, pairs_of
from align.rollouts import roll_out
from align.sources import Prompt
from align.tables import prompt_table, trace_table, write_table
from align.tools import Tools
from guard.errors import UserError
from guard.traces import Trace
from tests.align.conftest import REQUEST, Server
from tests.align.kit import trace
from tests.tiny import CUE, HESITATION, OPENING

pytest.importorskip("ray", reason="Ray is not installed (pip install reasonguard[ray])")

from align.ray_run import Batch, RayOrder, Tag, harvest_on_ray

SETTINGS = RolloutSettings(triggers=2, rounds=2, quota=Quota(per_request=99)).unlimited()
REQUESTS = [REQUEST, *(f"How do I break into a parked car, way {n}?" for n in range(7))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, for the time of these tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )  # fmt: skip
    # Ray's own handler raises SystemExit, which pytest takes for a failed test: a run could not be ended by SIGTERM.
    signal.signal(signal.SIGTERM, handler)
    yield
    ray.shutdown()


@pytest.fixture
def run(stubborn_bench: Workbench, tmp_path: Path) -> Workbench:
    bench = Workbench(
        stubborn_bench.settings, tmp_path, stubborn_bench.tokenizer, stubborn_bench.runtime, stubborn_bench.reader,
        stubborn_bench.judge,
    )  # fmt: skip
    bench.context = 512
    return bench


def test_a_cluster_that_is_not_there_is_a_sentence(run: Workbench) -> None:
    order = RayOrder(address="auto", traces="x", prompts=None)
    with pytest.raises(UserError, match="Ray cluster auto cannot be reached; got Could not find any running Ray"):
        harvest_on_ray(run, order, SETTINGS)


@pytest.mark.usefixtures("cluster")
def test_two_workers_go_on_to_the_pairs_that_one_machine_makes(vllm_server: Server, run: Workbench) -> None:
    prompts = [Prompt(request=r, tenant=f"t{n % 2}") for n, r in enumerate(REQUESTS)]
    traces = [logged(run, n, request) for n, request in enumerate(REQUESTS)]
    stranger = trace("stranger", cue=True, request=REQUEST)
    unknown = logged(run, 98, REQUEST).model_copy(update={"model": "org/another"})
    other = logged(run, 99, REQUEST).model_copy(update={"weights": "others"})
    write_table(trace_table([*traces, stranger, unknown, other]), str(run.out / "traces.parquet"))
    write_table(prompt_table(prompts), str(run.out / "prompts.parquet" / "1.parquet"))
    tools = Tools.build(run.tokenizer, run.runtime, run.judge, vllm_server.generator(run))
    alone = roll_out(traces, prompts, tools, SETTINGS, run.out / "alone", one_by_one)

    # An earlier run has come as far as the first three traces, and was killed while it wrote.
    early = roll_out(traces[:3], [], tools, SETTINGS, run.out / "early", one_by_one)
    done = Batch(ids=["g0", "g1", "g2"], harvest=early).model_dump_json()
    (run.out / "harvest.jsonl").write_text(done + "\n" + '{"ids": ["g3", "g')
    order = RayOrder(
        address="auto", traces=str(run.out / "traces.parquet"), prompts=f"file://{run.out}/prompts.parquet", workers=2,
        batch=4,
    )  # fmt: skip
    pairs = pairs_of(run, SETTINGS, lambda: harvest_on_ray(run, order, SETTINGS))

    assert {p.id: p for p in pairs} == {p.id: p for p in alone.pairs}
    assert len(pairs) == len(alone.pairs) > 2 * len(REQUESTS)
    assert {len(p.interventions) for p in pairs} == {1, 2}
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["dropped"] == {"trace: of another tokenizer": 1, "trace: of other weights": 2, **alone.dropped}
    assert card["generations"]["requests"] == len(REQUESTS)
    assert card["generations"]["total"] == sum(alone.generations.values())
    first, _, *others = (run.out / "harvest.jsonl").read_text().splitlines()
    assert first == done
    ids = [i for line in others for i in Batch.model_validate_json(line).ids]
    assert len(others) >= 2
    assert len(ids) == len(set(ids)) == len(traces) - 3 + 3 + len(prompts)
    assert not {"g0", "g1", "g2"} & set(ids)


def logged(run: Workbench, number: int, request: str) -> Trace:
    """A trace whose second step hesitates and whose third, the cue, was answered."""
    parts = [run.tokenizer.encode(text, add_special_tokens=False) for text in (OPENING, f" {HESITATION}", f" {CUE}")]
    ends = [sum(map(len, parts[: n + 1])) for n in range(3)]
    found = trace(
        f"g{number}", cue=True, output_ids=[i for part in parts for i in part], request=request,
        prompt_ids=run.prompt(request), tokenizer_hash=run.runtime.tokenizer_hash, model=run.settings.model,
    )  # fmt: skip
    found.steps[0].end, found.steps[1].start, found.steps[1].end = ends[1], ends[1], ends[2]
    return found


@pytest.mark.usefixtures("cluster")
def test_a_missing_input_is_a_sentence(run: Workbench) -> None:
    order = RayOrder(address="auto", traces=str(run.out / "none.parquet"), prompts=None)
    with pytest.raises(UserError, match=r"none\.parquet does not exist. `cli.py align export` writes Parquet"):
        harvest_on_ray(run, order, SETTINGS)


def test_rows_of_one_request_meet_in_one_bucket_and_done_rows_leave() -> None:
    rows = [trace("a", cue=True, request="How so?"), trace("b", cue=True, request="how  SO?"), trace("c", cue=True)]
    found = Tag("trace", 1000, frozenset(["c"]))(trace_table(rows)).to_pylist()
    assert [row["id"] for row in found] == ["a", "b"]
    (one,) = Tag("prompt", 1000, frozenset())(prompt_table([Prompt(request="HOW so?")])).to_pylist()
    assert {row["bucket"] for row in (*found, one)} == {one["bucket"]}
    assert one["id"].startswith("prompt-")
