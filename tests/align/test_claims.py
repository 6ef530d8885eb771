"""A run's directory: what may change from one start to the next, and what is told when something else is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align import pipeline
from align.claims import Parts
from align.pairs import write_pairs
from align.pipeline import AlignSettings, Workbench
from align.recipe import DEFAULT, read_stages
from align.train import TrainSettings
from cli import app
from guard.errors import UserError
from tests.align.runs import pair


def opened(settings: AlignSettings, out: Path) -> AlignSettings:
    """The settings in force in a run that is opened and left."""
    with Workbench.open(settings, out) as bench:
        return bench.settings


def recorded(out: Path) -> AlignSettings:
    return AlignSettings.model_validate_json((out / "align.json").read_text())


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("seed", 1, "`seed` differs; got 1; wanted 0"),
        ("policy", Path("p.yaml"), r"`policy` differs; got p\.yaml; wanted none"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(
    tiny_model: Path, tmp_path: Path, field: str, value: object, wanted: str
) -> None:
    settings = AlignSettings(model=str(tiny_model))
    opened(settings, tmp_path)
    with pytest.raises(UserError, match=f"holds another align run: {wanted}.*Choose another --out"):
        opened(settings.model_copy(update={field: value}), tmp_path)


def test_stages_and_length_may_change_and_stay_where_nobody_asks(tiny_model: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    opened(AlignSettings(model=model), tmp_path)
    assert recorded(tmp_path).stages == read_stages(DEFAULT), "what is trained by default"
    one = tmp_path / "one.yaml"
    one.write_text("- epochs: 2.0\n")
    opened(AlignSettings.of(model, stages=one, max_tokens=99), tmp_path)
    kept = opened(AlignSettings.of(model), tmp_path)
    assert (kept.stages, kept.max_tokens) == ([TrainSettings(epochs=2.0)], 99)
    assert kept == recorded(tmp_path)
    assert [stage.seed for stage in AlignSettings.of(model, None, 5).recipe] == [5, 5]


def test_a_card_is_written_once_whole_and_read_by_what_it_says(tiny_model: Path, tmp_path: Path) -> None:
    settings = AlignSettings(model=str(tiny_model), seed=2)
    opened(settings, tmp_path)
    cards = [tmp_path / name for name in ("align.json", "parts.json")]
    before = [card.stat() for card in cards]
    opened(settings, tmp_path)
    assert [(c.stat().st_ino, c.stat().st_mtime_ns) for c in cards] == [(s.st_ino, s.st_mtime_ns) for s in before]
    # Written before a field was there, and in another spelling.
    older = '{"model": %r, "seed": 2}' % str(tiny_model)  # noqa: UP031
    cards[0].write_text(older.replace("'", '"'))
    assert opened(settings, tmp_path).seed == 2
    # An earlier program was killed while it wrote.
    cards[0].write_text("")
    opened(settings, tmp_path)
    assert recorded(tmp_path) == settings
    cards[0].write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"align\.json is damaged, or another version's, at model"):
        opened(settings, tmp_path)


def test_a_killed_writer_leaves_the_card_that_was_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AlignSettings(model=str(tiny_model))
    opened(settings, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(settings.model_copy(update={"max_tokens": 99}), tmp_path)
    assert recorded(tmp_path) == settings


def test_what_paths_hold_is_part_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_step_tokens: 90\n")
    settings = AlignSettings(model=str(tiny_model), policy=policy)
    out = tmp_path / "run"
    opened(settings, out)
    policy.write_text("max_step_tokens: 80\n")
    with pytest.raises(UserError, match="begun with something else under the same names: `policy` differs; got"):
        opened(settings, out)
    policy.write_text("max_step_tokens: 90\n")
    held = Parts.model_validate_json((out / "parts.json").read_text())
    for part in ("weights", "tokenizer", "detector", "judge"):
        (out / "parts.json").write_text(held.model_copy(update={part: "before"}).model_dump_json())
        with pytest.raises(UserError, match=f"`{part}` differs; got {getattr(held, part)}; wanted before"):
            opened(settings, out)


def test_weights_that_nobody_could_know_are_kept_once_they_are_known(tmp_path: Path) -> None:
    known = Parts(weights="w", tokenizer="t", policy="p", detector="d", judge="j")
    unknown = known.model_copy(update={"weights": ""})
    for parts in (unknown, known, unknown):
        parts.claim(tmp_path)
    assert Parts.model_validate_json((tmp_path / "parts.json").read_text()) == known
    with pytest.raises(UserError, match="`weights` differs; got other; wanted w"):
        known.model_copy(update={"weights": "other"}).claim(tmp_path)


def invoke(*args: object) -> None:
    result = CliRunner().invoke(app, ["align", *map(str, args)])
    assert result.exit_code == 0, (result.output, result.exception)


def test_pairs_of_a_policy_are_trained_in_other_stages(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`align pairs --policy P --seed 3`, then `align train --stages one.yaml`, then `align pairs` again."""
    seen: list[AlignSettings] = []

    class Trained:
        pairs, benign, seconds = 1, 0, 0.0

    def look(bench: Workbench, *_: object) -> type[Trained]:
        seen.append(bench.settings)
        return Trained

    monkeypatch.setattr(pipeline, "train_adapter", look)
    policy, out = tmp_path / "policy.yaml", tmp_path / "run"
    policy.write_text("max_step_tokens: 90\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    made = ("pairs", "--prompts", prompts, "--model", tiny_model, "--out", out, "--policy", policy, "--seed", 3)
    invoke(*made)
    write_pairs([pair("a")], out / "pairs.jsonl")
    one = tmp_path / "one.yaml"
    one.write_text("- epochs: 2.0\n")
    invoke("train", "--model", tiny_model, "--out", out, "--stages", one)
    invoke("train", "--model", tiny_model, "--out", out)
    invoke(*made)
    assert [(s.policy, s.seed, len(s.stages)) for s in (*seen, recorded(out))] == [(policy, 3, 1)] * 3
    alone = tmp_path / "alone"
    alone.mkdir()
    write_pairs([pair("a")], alone / "pairs.jsonl")
    invoke("train", "--model", tiny_model, "--out", alone)
    assert (seen[-1].seed, seen[-1].stages) == (0, read_stages(DEFAULT)), "pairs from elsewhere are a run of their own"
