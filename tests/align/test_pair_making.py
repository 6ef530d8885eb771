"""From prompts and traces to pairs on a real vLLM server: which ids every pair holds, and what is counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from align import pipeline
from align.candidates import RolloutSettings
from align.pairs import Quota, read_pairs, write_pairs
from align.pipeline import Workbench, make_pairs
from align.rollouts import Harvest
from align.sources import Prompt
from guard.errors import UserError
from guard.traces import Spool
from guard.triggers import POOL
from tests.align import runs
from tests.align.conftest import REQUEST, STUBBORN, Server
from tests.align.kit import trace
from tests.tiny import ANSWER, CUE, HESITATION, OPENING, PLAN, REFUSAL_STEP

#: These begin with the cue's first word: both sides would go on alike.
ALIKE = {"be-careful", "decline-kindly"}
ENOUGH = {"max_tokens": 120, "quota": Quota(per_request=99)}


@pytest.fixture
def run(stubborn_bench: Workbench, tmp_path: Path) -> Workbench:
    """The shared workbench with an output directory of its own."""
    return Workbench(
        stubborn_bench.settings, tmp_path, stubborn_bench.tokenizer, stubborn_bench.runtime, stubborn_bench.reader,
        stubborn_bench.judge,
    )  # fmt: skip


def ids(bench: Workbench, text: str) -> list[int]:
    return list(bench.tokenizer.encode(text, add_special_tokens=False))


def said(bench: Workbench, trigger: str) -> list[int]:
    """What the model says after a trigger that turns it round."""
    text = next(t.text for t in POOL if t.id == trigger)
    return ids(bench, f" {text} {REFUSAL_STEP}</think>{ANSWER}<|im_end|>")


def test_prompts_give_pairs_in_rounds_within_the_papers_budget(vllm_server: Server, run: Workbench) -> None:
    settings = RolloutSettings(triggers=14, rounds=3, max_generations=20, **ENOUGH)
    prompts = [Prompt(request=REQUEST, tenant="t"), Prompt(request=REQUEST, tenant="t")]
    pairs = make_pairs(run, [], prompts, settings, vllm_server.generator(run))
    complied = ids(run, f" {CUE} {' '.join(PLAN)}</think>{ANSWER}<|im_end|>")
    prefix = ids(run, OPENING)
    assert Counter(p.trigger_id for p in pairs) == Counter(t.id for t in POOL if t.id not in ALIKE)
    for pair in pairs:
        assert (pair.kind, pair.tenant, pair.request, pair.guard_id) == ("intervened", "t", REQUEST, prompts[0].id)
        assert (pair.prompt_ids, pair.prefix_ids, pair.rejected_ids) == (run.prompt(REQUEST), prefix, complied)
        assert (pair.chosen_finish, pair.rejected_finish) == ("stop", "stop")
        first, *later = [placed.trigger_id for placed in pair.interventions]
        assert first == pair.trigger_id
        assert pair.interventions[0].at == len(prefix)
        if first not in STUBBORN:
            assert pair.chosen_ids == said(run, first)
            assert later == []
            continue
        # The model hesitated, its cue came back and was cut before its step.
        relapses = [first, *later]
        expected: list[int] = []
        for placed in pair.interventions[:-1]:
            assert placed.at == len(prefix) + len(expected)
            text = next(t.text for t in POOL if t.id == placed.trigger_id)
            expected += ids(run, f" {text} {HESITATION}")
        assert pair.chosen_ids == expected + said(run, relapses[-1])
        assert STUBBORN.issuperset(relapses[:-1])
        assert relapses[-1] not in STUBBORN
    made = pairs[0].provenance
    assert made is not None
    assert (made.origin, made.settings_hash, made.judge) == ("prompt", settings.hash, run.judge.version)
    assert (made.detector, made.tokenizer_hash) == (run.runtime.detector.version, run.runtime.tokenizer_hash)
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["dropped"] == {"prompt: repeated": 1, "intervened: sides do not part at the divergence": 2}
    assert next((r["generated"], r["returned"] and r["returned"]["n"]) for r in card["rounds"]) == (14, 14)
    later_rounds = sum(len(p.interventions) - 1 for p in pairs)
    assert card["generations"] == {
        "total": 15 + later_rounds, "requests": 1, "mean": 15.0 + later_rounds, "most": 15 + later_rounds, "limit": 20,
    }  # fmt: skip
    assert card["pairs_sha256"] == hashlib.sha256((run.out / "pairs.jsonl").read_bytes()).hexdigest()
    assert (card["requests"], card["tenants"], card["largest_tenant"]["n"]) == (1, 1, len(pairs))
    assert card["interventions"] == {str(k): v for k, v in Counter(len(p.interventions) for p in pairs).items()}
    text = (run.out / "pairs.md").read_text()
    assert f"{15 + later_rounds} continuations for 1 requests" in text
    for secret in (REQUEST, CUE, REFUSAL_STEP):
        assert secret not in text + json.dumps(card)
    assert read_pairs(run.out / "pairs.jsonl") == pairs


def test_fourteen_generations_are_the_limit_and_what_it_leaves_out_is_counted(
    vllm_server: Server, run: Workbench
) -> None:
    settings = RolloutSettings(triggers=14, rounds=2, **ENOUGH)
    pairs = make_pairs(run, [], [Prompt(request=REQUEST)], settings, vllm_server.generator(run))
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["generations"]["most"] == card["generations"]["total"] == 14
    # One reply and 13 of the 14 triggers: nothing is left for a second round.
    assert card["dropped"]["intervened: request's generations used up"] == 1
    # A relapse is kept as it is where no generation is left to answer it, and the judge does not take it.
    assert card["dropped"]["intervened: chosen reasoning judged harmful"] >= 1
    assert len(pairs) == 14 - sum(card["dropped"].values())
    assert all(len(p.interventions) == 1 and p.trigger_id not in STUBBORN | ALIKE for p in pairs)


def test_traces_give_pairs_whose_rejected_side_is_the_cue_continued(vllm_server: Server, run: Workbench) -> None:
    opening, cue = ids(run, OPENING), ids(run, f" {CUE}")
    here = {"prompt_ids": run.prompt(REQUEST), "request": REQUEST, "tokenizer_hash": run.runtime.tokenizer_hash}
    intervened = trace("g1", cue=True, output_ids=[*opening, *cue, 50, 51], tenant="t", **here)
    calm_ids = [*opening, *ids(run, f" {HESITATION}</think>{ANSWER}<|im_end|>")]
    calm = trace("g2", cue=False, output_ids=calm_ids, **here)
    for each, end in ((intervened, len(opening) + len(cue)), (calm, len(calm_ids))):
        each.steps[0].end = each.steps[1].start = len(opening)
        each.steps[1].end = end
    settings = RolloutSettings(seed=3, **ENOUGH)
    found = make_pairs(run, [intervened, calm], settings=settings, backend=vllm_server.generator(run))
    pairs = {pair.guard_id: pair for pair in found}
    assert pairs["g1"].rejected_ids == [*cue, *ids(run, f" {' '.join(PLAN)}</think>{ANSWER}<|im_end|>")]
    assert pairs["g1"].rejected_finish == "stop"
    assert pairs["g1"].tenant == "t"
    provenance = pairs["g1"].provenance
    assert provenance is not None
    assert (provenance.origin, provenance.policy_hash, provenance.detector) == ("trace", "hash", "det")
    assert pairs["g2"].kind == "benign"
    assert pairs["g2"].chosen_ids == calm_ids[len(opening) :]
    assert pairs["g2"].chosen_finish is None
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["sources"] == {"trace: benign": 1, "trace: intervened": 1}
    assert card["generations"]["total"] == 3
    assert card["rounds"] == [{"generated": 2, "returned": None}]


def test_what_does_not_fit_the_context_is_dropped_and_not_sent(vllm_server: Server, run: Workbench) -> None:
    settings = RolloutSettings(max_tokens=120, sample_tokens=500)
    assert make_pairs(run, [], [Prompt(request=REQUEST)], settings, vllm_server.generator(run)) == []
    card = json.loads((run.out / "pairs.json").read_text())
    assert card["dropped"] == {"prompt: longer than the engine's context": 1}
    assert card["generations"]["total"] == 0
    assert card["kept"] == {"rate": 0.0, "lo": 0.0, "hi": 1.0, "n": 0}


def test_an_interrupted_run_generates_only_what_is_missing(vllm_server: Server, run: Workbench) -> None:
    settings = RolloutSettings(triggers=3, rounds=2, **ENOUGH)
    first = make_pairs(run, [], [Prompt(request=REQUEST)], settings, vllm_server.generator(run))
    rollouts = (run.out / "rollouts.jsonl").read_text()
    for name in ("pairs.jsonl", "pairs.json"):
        (run.out / name).unlink()
    (run.out / "rollouts.jsonl").write_text("".join(rollouts.splitlines(keepends=True)[:2]) + '{"id": "to')
    assert make_pairs(run, [], [Prompt(request=REQUEST)], settings, vllm_server.generator(run)) == first
    assert Counter((run.out / "rollouts.jsonl").read_text().splitlines()) == Counter(
        [*rollouts.splitlines(), '{"id": "to']
    )
    with pytest.raises(UserError, match="holds other pairs: `rounds` differs; got 1; wanted 2"):
        make_pairs(run, [], [], settings.model_copy(update={"rounds": 1}))
    assert make_pairs(run, []) == first, "without settings any pairs will do"


def test_pairs_are_read_from_disk_before_anything_starts(run: Workbench, capfd: pytest.CaptureFixture[str]) -> None:
    write_pairs([runs.pair("a")], run.out / "pairs.jsonl")
    assert pipeline.make_pairs(run, []) == [runs.pair("a")]
    told = " ".join(capfd.readouterr().err.split())
    assert "has 1 pairs already, which are used; for those of new traces choose another --out" in told


def test_no_pairs_count_as_none_made_and_the_traces_of_the_pairs_stay_counted(run: Workbench, tmp_path: Path) -> None:
    Spool(tmp_path / "traces")
    empty = RolloutSettings(max_tokens=120, sample_tokens=160)
    assert pipeline.make_pairs(run, pipeline.collect(run, tmp_path / "traces")) == []
    assert (run.out / "pairs.jsonl").read_text() == ""
    assert pipeline.pairs_of(run, empty, lambda: Harvest(pairs=[runs.pair("a")], candidates=1)) == [runs.pair("a")], (
        "there are traces by now"
    )
    assert json.loads((run.out / "collected.json").read_text())["traces"] == 0
    Spool(tmp_path / "traces").append(trace("later", cue=True, tokenizer_hash=run.runtime.tokenizer_hash))
    with pytest.raises(UserError, match="None of the 1 traces"):
        pipeline.collect(run, tmp_path / "traces")
    assert json.loads((run.out / "collected.json").read_text())["traces"] == 0, "the pairs come from none of these"


def test_the_runs_length_reaches_what_is_rolled_out() -> None:
    assert pipeline.AlignSettings(model="m").rollouts == RolloutSettings(max_tokens=120, sample_tokens=160)
    long = pipeline.AlignSettings(model="m", max_tokens=4096, seed=3).rollouts
    assert (long.max_tokens, long.sample_tokens, long.seed) == (3072, 4096, 3)
