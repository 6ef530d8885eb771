"""Training stages on disk: what is written, what an interruption leaves, what stops, and stages one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from align import pipeline, stage
from align.generate import EngineSpec, Generator, Result
from align.model import render
from align.pairs import Pair, Scope
from align.recipe import read_stages
from align.refusals import refusal_id, refusal_jobs, refusals
from align.text import ReplyReader
from align.train import TrainSettings, read_report, train
from guard.errors import UserError
from guard.policy import Policy
from guard.steps import StepLimits, TokenTable
from guard.zones import find_grammar
from tests.tiny import CUE, OPENING, PLAN, SPECIAL

LIMITS = StepLimits()
#: The tiny tokenizer's <|im_end|>.
END = SPECIAL.index("<|im_end|>")
CONFIGS = Path(stage.__file__).parent / "configs"
#: Eight pairs, four steps; float32, so that results can be compared.
SMALL = TrainSettings(
    dtype="float32", epochs=2, batch_size=4, save_steps=2, rank=4, first_layer=1, benign_share=0.5, learning_rate=1e-3,
    sft_weight=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def small_model(tiny_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer over random weights: those of the scripted one are mostly zero and learn nothing."""
    target = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> ReplyReader:
    backend = tokenizer.backend_tokenizer
    return ReplyReader(TokenTable.from_tokenizer(backend), find_grammar(backend))


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Pair]:
    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    found = []
    for n in range(8):
        kind = "intervened" if n % 2 else "benign"
        cue, trigger = ids(" " + CUE), ids(" Wait, this could hurt somebody.")
        chosen, rejected = (trigger, cue) if kind == "intervened" else (ids(" " + PLAN[0]), trigger)
        found.append(
            Pair(
                id=f"pair-{n}", kind=kind, guard_id=f"trace-{n}", request=f"request {n}",
                prompt_ids=ids(f"<|im_start|>user\nrequest {n}<|im_end|>\n<think>\n"), prefix_ids=ids(OPENING),
                chosen_ids=chosen, rejected_ids=rejected, trigger_id="wait-harm", chosen_harm=0.0, rejected_harm=1.0,
            )
        )  # fmt: skip
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One stage, trained without interruption."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    train(str(small_model), pairs, out, SMALL, reader, LIMITS)
    return out


def test_a_stage_leaves_its_report_metrics_and_adapter(trained: Path, pairs: list[Pair]) -> None:
    report = read_report(trained)
    assert report is not None
    assert (report.pairs, report.intervened, report.benign, report.steps) == (8, 4, 4, 4)
    assert report.settings == SMALL
    _, rows = stage.read(trained)
    assert {row.pair for row in rows} == {pair.id for pair in pairs}
    assert report.tokens == sum(row.tokens for row in rows)
    assert steps(trained) == [4]
    assert not list(trained.glob("checkpoint-*"))
    assert any(value.abs().max() > 0 for name, value in weights(trained).items() if "lora_B" in name)
    references = json.loads((trained / "reference.json").read_text())
    assert len(references) == 8
    assert all(value < 0 for row in references for value in row)


PAUSE = 30.0
"""Longer than all of this training takes."""


class Interrupt(TrainerCallback):
    """Ctrl-C after one step; the first took `PAUSE` seconds, as far as anybody can tell."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self._patch = step, monkeypatch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            clock = time.monotonic
            self._patch.setattr("align.callbacks.time.monotonic", lambda: clock() + PAUSE)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_stage_goes_on_to_the_same_adapter(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stage.run(out, [Interrupt(3, patch)])
    assert read_report(out) is None
    (out / "checkpoint-3").mkdir()
    assert stage.last_checkpoint(out) == out / "checkpoint-2", "a checkpoint without its state is not whole"
    (out / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3, "loss": 1.0}\n{"st')
    train(str(small_model), pairs, out, SMALL, reader, LIMITS)
    found, wanted = weights(out), weights(trained)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert steps(out) == [2, 4]
    report = read_report(out)
    assert report is not None
    assert report.seconds > PAUSE, "the steps before the checkpoint count too"


def test_another_stage_in_the_directory_is_refused(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path
) -> None:
    with pytest.raises(UserError, match="holds another training stage"):
        train(str(small_model), pairs, trained, SMALL.model_copy(update={"beta": 0.2}), reader, LIMITS)
    with pytest.raises(UserError, match="holds no training stage"):
        stage.read(trained.parent)


def test_a_row_is_cut_into_steps_by_the_policys_limits(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    settings = SMALL.model_copy(update={"scope": Scope(steps=1)})
    card = stage.StageCard(model=str(small_model), start=None, settings=settings)
    cut = {}
    for name, limits in (("whole", LIMITS), ("short", Policy(max_step_tokens=8).limits)):
        stage.prepare(tmp_path / name, card, pairs, reader, limits)
        cut[name] = {row.pair: len(row.rejected_ids) for row in stage.read(tmp_path / name)[1]}
    assert max(cut["short"].values()) == 8 < max(cut["whole"].values())


def test_rows_that_are_too_long_are_left_out_and_named(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    long = [pairs[0].model_copy(update={"id": "long", "prefix_ids": pairs[0].prefix_ids * 80}), *pairs]
    stage.prepare(
        tmp_path / "a", stage.StageCard(model=str(small_model), start=None, settings=SMALL), long, reader, LIMITS
    )
    card, rows = stage.read(tmp_path / "a")
    assert card.too_long == ["long"], "the small model knows 512 positions"
    assert len(rows) == 8
    shortest = min(row.length for row in rows)
    settings = SMALL.model_copy(update={"max_length": shortest - 1})
    with pytest.raises(UserError, match=f"8 pairs, 8 of them longer than {shortest - 1} tokens"):
        stage.prepare(
            tmp_path / "b", stage.StageCard(model="tiny", start=None, settings=settings), pairs, reader, LIMITS
        )


def test_benign_pairs_are_trained_on_once_more_behind_others_where_that_is_not_too_long(
    small_model: Path, pairs: list[Pair], tokenizer: Any, reader: ReplyReader, tmp_path: Path
) -> None:
    ended = [
        p.model_copy(update={"prompt_ids": render(tokenizer, p.request), "chosen_ids": [*p.chosen_ids, END]})
        for p in pairs
    ]
    settings = SMALL.model_copy(update={"benign_turns": 0.5, "scope": Scope(steps=1, benign_steps=None)})
    longest = max(len(p.prompt_ids + p.prefix_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in ended)
    rows = {}
    for name, limit in (("all", None), ("short", longest)):
        card = stage.StageCard(
            model=str(small_model), start=None, settings=settings.model_copy(update={"max_length": limit})
        )
        stage.prepare(tmp_path / name, card, ended, reader, LIMITS)
        card, rows[name] = stage.read(tmp_path / name)
        assert card.asked_again == len(rows[name]) - 8
    assert Counter(row.kind for row in rows["all"]) == {"benign": 6, "intervened": 4}
    behind = [row for row in rows["all"] if row not in rows["short"]]
    assert len(behind) == 2
    for row in behind:
        single = next(r for r in rows["short"] if r.pair == row.pair)
        assert row.chosen_ids == single.chosen_ids
        assert row.prompt_ids[-len(single.prompt_ids) :] == single.prompt_ids
        assert row.prompt_ids.count(END) > single.prompt_ids.count(END) + 1, "the other exchange is whole"
    assert [row for row in rows["all"] if row not in behind] == rows["short"]


@pytest.mark.filterwarnings("ignore")
def test_a_diverging_stage_stops_and_keeps_its_last_good_weights(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    with pytest.raises(UserError, match=r"diverged at step 4; got chosen_logp nan\..*checkpoint-2"):
        stage.run(out, [Poison()])
    assert read_report(out) is None
    assert all(value.isfinite().all() for value in weights(out / "checkpoint-2").values())


def test_full_training_changes_the_lowest_layer_too(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, tmp_path: Path
) -> None:
    settings = TrainSettings(method="full", dtype="float32", epochs=3, batch_size=8, benign_share=0.5)
    train(str(small_model), pairs, tmp_path / "full", settings, reader, LIMITS)
    before, after = load_file(small_model / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="first_layer belongs to method lora"):
        TrainSettings(method="full", first_layer=1)


def test_two_processes_of_accelerate_launch_give_the_adapter_of_one(
    small_model: Path, pairs: list[Pair], reader: ReplyReader, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    stage.prepare(out, stage.StageCard(model=str(small_model), start=None, settings=SMALL), pairs, reader, LIMITS)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent.parent)}
    result = subprocess.run([*command, "-m", "align.launch", str(out)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found, wanted = weights(out), weights(trained)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=2e-4)
    assert json.loads((out / "reference.json").read_text()) == [
        pytest.approx(row, abs=1e-4) for row in json.loads((trained / "reference.json").read_text())
    ]


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_accelerate_understands_the_configs(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == name.upper()
    assert config.num_processes == 8


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


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"report_to": ["wandb"]}, "Tracker wandb is not installed"),
        ({"batch_size": 5, "micro_batch": 2}, "batch_size does not split; got 5 pairs over 1 processes of 2"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(tmp_path: Path, changed: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        stage.arguments(TrainSettings(**changed), tmp_path)


MOST = 90
"""Tokens of a reply in these runs."""


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
    assert (report.intervened, report.benign) == (1, 1)
    card, rows = stage.read(tmp_path / "adapter")
    assert card.start == tmp_path / "stage-1"
    references = json.loads((tmp_path / "adapter" / "reference.json").read_text())
    first_rows = stage.read(tmp_path / "stage-1")[1]
    first_references = json.loads((tmp_path / "stage-1" / "reference.json").read_text())
    before = {row.pair: values for row, values in zip(first_rows, first_references, strict=True)}
    number = next(i for i, row in enumerate(rows) if row.kind == "intervened")
    margins = [chosen - rejected for chosen, rejected in (references[number], before[rows[number].pair])]
    assert margins[0] > margins[1] + 1e-3, "the reference is the first stage's model"
    assert set(weights(tmp_path / "adapter")) == set(weights(trained))
