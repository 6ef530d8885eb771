"""The same rollouts on a real Ray cluster of two workers, each with a vLLM engine of its own."""

from __future__ import annotations

import json
import os
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
from tests.align.conftest import REQUEST, Server
from tests.align.kit import trace
from tests.tiny import CUE, OPENING

pytest.importorskip("ray", reason="Ray is not installed (pip install reasonguard[ray])")

from align.ray_run import Batch, RayOrder, Tag, harvest_on_ray

SETTINGS = RolloutSettings(triggers=2, rounds=2, quota=Quota(per_request=99)).unlimited()
REQUESTS = [REQUEST, *(f"How do I break into a parked car, way {n}?" for n in range(7))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, for the time of these tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
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


@pytest.mark.usefixtures("cluster")
def test_two_workers_make_the_pairs_that_one_machine_makes(vllm_server: Server, run: Workbench) -> None:
    prompts = [Prompt(request=r, tenant=f"t{n % 2}") for n, r in enumerate(REQUESTS)]
    encode = run.tokenizer.encode
    opening, cue = encode(OPENING, add_special_tokens=False), encode(f" {CUE}", add_special_tokens=False)
    traces = []
    for n, request in enumerate(REQUESTS):
        each = trace(
            f"g{n}", cue=True, output_ids=[*opening, *cue], request=request, prompt_ids=run.prompt(request),
            tokenizer_hash=run.runtime.tokenizer_hash,
        )  # fmt: skip
        each.steps[0].end = each.steps[1].start = len(opening)
        each.steps[1].end = len(opening) + len(cue)
        traces.append(each)
    stranger = trace("stranger", cue=True, request=REQUEST)
    write_table(trace_table([*traces, stranger]), str(run.out / "traces.parquet"))
    write_table(prompt_table(prompts), str(run.out / "prompts.parquet" / "1.parquet"))
    order = RayOrder(
        address="auto", traces=str(run.out / "traces.parquet"), prompts=f"file://{run.out}/prompts.parquet", workers=2,
        batch=4,
    )  # fmt: skip
    pairs = pairs_of(run, SETTINGS, lambda: harvest_on_ray(run, order, SETTINGS))

    tools = Tools.build(run.tokenizer, run.runtime, run.judge, vllm_server.generator(run))
    alone = roll_out(traces, prompts, tools, SETTINGS, run.out / "alone", one_by_one)
    assert {p.id: p for p in pairs} == {p.id: p for p in alone.pairs}
    assert len(pairs) == len(alone.pairs) == 2 * 2 * len(REQUESTS)
    assert {len(p.interventions) for p in pairs} == {1, 2}
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["dropped"] == {"trace: of another tokenizer": 1}
    # Prompt and trace of one request have met in one batch: its generations are counted together.
    assert card["generations"]["requests"] == len(REQUESTS)
    assert card["generations"]["total"] == sum(alone.generations.values())
    batches = [Batch.model_validate_json(line) for line in (run.out / "harvest.jsonl").read_text().splitlines()]
    assert len(batches) >= 2
    assert len({i for batch in batches for i in batch.ids}) == sum(len(batch.ids) for batch in batches) == 17

    # A run that lost its last batch, torn, does that one again.
    lines = (run.out / "harvest.jsonl").read_text().splitlines()
    (run.out / "harvest.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    (run.out / "pairs.jsonl").unlink()
    assert {p.id for p in pairs_of(run, SETTINGS, lambda: harvest_on_ray(run, order, SETTINGS))} == {
        p.id for p in pairs
    }
    again = (run.out / "harvest.jsonl").read_text().splitlines()
    assert again[: len(lines) - 1] == lines[:-1]
    assert Batch.model_validate_json(again[-1]) == batches[-1]


@pytest.mark.usefixtures("cluster")
def test_a_missing_input_is_a_sentence(run: Workbench) -> None:
    order = RayOrder(address="auto", traces=str(run.out / "none.parquet"), prompts=None)
    with pytest.raises(UserError, match=r"none\.parquet does not exist. `cli.py align export` writes Parquet"):
        harvest_on_ray(run, order, SETTINGS)


def test_a_cluster_that_is_not_there_is_a_sentence(run: Workbench) -> None:
    order = RayOrder(address="ray://127.0.0.1:1", traces="x", prompts=None)
    with pytest.raises(UserError, match=r"Ray cluster ray://127\.0\.0\.1:1 cannot be reached"):
        harvest_on_ray(run, order, SETTINGS)


def test_rows_of_one_request_meet_in_one_bucket_and_done_rows_leave() -> None:
    rows = [trace("a", cue=True, request="How so?"), trace("b", cue=True, request="how  SO?"), trace("c", cue=True)]
    found = Tag("trace", 1000, frozenset(["c"]))(trace_table(rows)).to_pylist()
    assert [row["id"] for row in found] == ["a", "b"]
    (one,) = Tag("prompt", 1000, frozenset())(prompt_table([Prompt(request="HOW so?")])).to_pylist()
    assert {row["bucket"] for row in (*found, one)} == {one["bucket"]}
    assert one["id"].startswith("prompt-")
