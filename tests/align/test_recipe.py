"""Recipes: a file of stages, stages one after the other, and what the first one refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align import pipeline, stage
from align.generate import EngineSpec, Generator, Result
from align.pairs import Pair
from align.recipe import read_stages
from align.refusals import refusal_id, refusal_jobs, refusals
from align.train import read_report
from guard.errors import UserError
from tests.align.small import SMALL, weights
from tests.tiny import PLAN

CONFIGS = Path(stage.__file__).parent / "configs"
MOST = 90
"""Tokens of a reply in these runs."""


def test_a_stages_file_is_checked(tmp_path: Path) -> None:
    first, second = read_stages(CONFIGS / "paper.yaml")
    assert (first.benign_share, first.sft_weight, second.benign, second.sft_weight) == (0.0, 0.0, "refusal", 0.2)
    path = tmp_path / "stages.yaml"
    for text, wanted in (
        ("- epoch: 3", "epoch"), ("- rank: [", "not YAML"), ("[]", "holds no stage"),
        ("- rank: 8\n  rank: 9", r"a key stands twice \(line 2\)"),
        ("- benign: refusal", "no stage before it"), ("- rank: 8\n- rank: 16", "2 different shapes"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=wanted):
            read_stages(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_stages(tmp_path / "none.yaml")


def test_a_recipe_that_differs_from_what_was_trained_is_refused(
    small_model: Path, pairs: list[Pair], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "adapter")
    settings = pipeline.AlignSettings(model=str(small_model), stages=[SMALL])
    with pipeline.Workbench.open(settings, tmp_path) as bench:
        assert pipeline.train_adapter(bench, pairs) == read_report(trained)
    other = settings.model_copy(update={"stages": [SMALL.model_copy(update={"epochs": 3.0})]})
    with (
        pipeline.Workbench.open(other, tmp_path) as bench,
        pytest.raises(
            UserError, match=r"adapter holds another training stage: `epochs` differs; got 3\.0; wanted 2\.0"
        ),
    ):
        pipeline.train_adapter(bench, pairs)
    two = settings.model_copy(update={"stages": [SMALL, SMALL]})
    with (
        pipeline.Workbench.open(two, tmp_path) as bench,
        pytest.raises(UserError, match="`start` differs; got stage-1; wanted the model as it came"),
    ):
        pipeline.train_adapter(bench, pairs)
    assert not (tmp_path / "stage-1").exists(), "nothing was trained before it was told"


def refused(pairs: list[Pair], tokenizer: Any, out: Path) -> list[Pair]:
    """Writes what the trained model would say: the first benign pair is refused, the others are answered."""
    benign = [pair for pair in pairs if pair.kind == "benign"]
    said = " So I have to refuse.</think>I'm sorry, but I can't help with that.<|im_end|>"
    texts = [f" {PLAN[0][:8]}{said}", *[f" {PLAN[0]}</think>Gladly! Here is how it works.<|im_end|>"] * 3]
    lines = [
        Result(
            id=job.id, job=job.key, output_ids=tokenizer.encode(text, add_special_tokens=False), finish="stop"
        ).model_dump_json()
        for job, text in zip(refusal_jobs(benign, MOST), texts, strict=True)
    ]
    out.mkdir(parents=True)
    (out / "refusals.jsonl").write_text("\n".join(lines) + "\n")
    return benign


def test_benign_pairs_are_rejected_by_what_the_first_stage_refuses(
    small_model: Path, pairs: list[Pair], tokenizer: Any, tmp_path: Path
) -> None:
    with pipeline.Workbench.open(pipeline.AlignSettings(model=str(small_model)), tmp_path / "run") as bench:
        benign = refused(pairs, tokenizer, tmp_path / "stage-1")
        # All results are on disk: the engine is never started.
        generator = Generator(EngineSpec(model="none"), tmp_path / "engine.log")
        found, counts = refusals(
            pairs, generator, bench.reader, bench.judge, tmp_path / "stage-1", max_tokens=MOST
        )  # fmt: skip
    assert counts == {"refused": 1, "answered": 3}
    (pair,) = found
    assert pair.id == refusal_id(benign[0])
    assert pair.prompt_ids == benign[0].prompt_ids
    assert pair.prefix_ids + pair.chosen_ids == benign[0].prefix_ids + benign[0].chosen_ids
    assert pair.prefix_ids != benign[0].prefix_ids, "both sides begin with the same word"
    assert pair.chosen_ids[0] != pair.rejected_ids[0]
    assert tokenizer.decode(pair.rejected_ids).endswith("I'm sorry, but I can't help with that.<|im_end|>")


def test_two_stages_train_one_adapter(
    small_model: Path, pairs: list[Pair], tokenizer: Any, trained: Path, tmp_path: Path
) -> None:
    first = SMALL.model_copy(update={"benign_share": 0.0, "sft_weight": 0.0, "epochs": 4})
    second = SMALL.model_copy(update={"benign": "refusal", "sft_weight": 0.2, "epochs": 1, "benign_share": 0.5})
    settings = pipeline.AlignSettings(model=str(small_model), stages=[first, second], max_tokens=MOST)
    with pipeline.Workbench.open(settings, tmp_path) as bench:
        refused(pairs, tokenizer, tmp_path / "stage-1")
        report = pipeline.train_adapter(bench, pairs)
        again = pipeline.train_adapter(bench, pairs)
    assert report == again
    one = read_report(tmp_path / "stage-1")
    assert one is not None
    assert (one.intervened, one.benign) == (4, 0)
    assert (report.intervened, report.benign) == (4, 4)
    card, rows = stage.read(tmp_path / "adapter")
    benign = [pair for pair in pairs if pair.kind == "benign"]
    wanted = {refusal_id(benign[0]), *(pair.id for pair in benign[1:])}
    assert {row.pair for row in rows if row.kind == "benign"} == wanted, "what the first stage answers stays"
    assert card.start == tmp_path / "stage-1"
    references = json.loads((tmp_path / "adapter" / "reference.json").read_text())
    first_rows = stage.read(tmp_path / "stage-1")[1]
    first_references = json.loads((tmp_path / "stage-1" / "reference.json").read_text())
    before = {row.pair: values for row, values in zip(first_rows, first_references, strict=True)}
    number = next(i for i, row in enumerate(rows) if row.kind == "intervened")
    margins = [chosen - rejected for chosen, rejected in (references[number], before[rows[number].pair])]
    assert margins[0] > margins[1] + 1e-3, "the reference is the first stage's model"
    assert set(weights(tmp_path / "adapter")) == set(weights(trained))
