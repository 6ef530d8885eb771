"""From a run's directory to a version: what it holds, what is refused, what a crash or a full disk leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align import versions
from align.gate import GateSettings
from align.promote import promote, roll_back
from align.versions import Event, history, locked, put_in_force
from classifiers.stats import Rate
from guard.errors import UserError
from guard.weights import Registry, weights_hash
from tests.align.reports import HOSTILE, arm
from tests.align.runs import DECLINES, LOOPS, make_run, passing
from tests.test_cli import ROOT, cli, sentence

GATE = GateSettings()


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that pass the gate."""
    root = tmp_path_factory.mktemp("runs")
    return make_run(tiny_model, root / "one", DECLINES), make_run(tiny_model, root / "two", LOOPS)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "versions").mkdir()
    return Registry(tmp_path / "versions")


def test_a_version_holds_what_it_needs_and_nothing_that_runs(
    runs: tuple[Path, Path], registry: Registry, tiny_model: Path
) -> None:
    assert promote(registry, runs[0], GATE).version == 1
    files = registry.verify(1, weights_hash(str(tiny_model))).files
    assert set(files) == {
        "card.md", "gate.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/train.json", "model/config.json", "model/generation_config.json", "model/model.safetensors",
        "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja",
    }  # fmt: skip
    assert registry.current() == 1
    assert (
        weights_hash(str(registry.model(1))) == registry.manifest(1).weights == weights_hash(str(runs[0] / "aligned"))
    )
    (event,) = history(registry)
    assert (event.event, event.version, event.before, event.forced, event.reasons) == ("promoted", 1, 0, False, [])


def test_the_card_has_figures_and_provenance_and_no_texts(
    runs: tuple[Path, Path], registry: Registry, tiny_model: Path, tmp_path: Path
) -> None:
    promote(registry, runs[0], GATE)
    card = (registry.directory(1) / "card.md").read_text()
    assert "| aligned: reasoning harm, relative drop | 80.0 % [70, 87] n=120 |" in card
    assert "| aligned | 18.1 % [13, 25] n=144 | 16.7 % [11, 24] n=144 | 4.2 % [2, 9] n=120 | no guard |" in card
    assert "Judge `judge-1`, detector `detector-1` at 0.816" in card
    assert "Command: `python cli.py align`; seeds [0, 1]." in card
    assert registry.manifest(1).base in card
    assert "| preference pairs | 2 | `" in card
    assert "| traces behind them (their ids) | 2 | `" in card
    assert "traces: 2;\nusable: 2." in card
    assert "SECRET REQUEST" not in card
    run = make_run(tiny_model, tmp_path / "hostile", LOOPS, passing(command=HOSTILE, notes=[HOSTILE]))
    promote(registry, run, GATE)
    hostile = (registry.directory(2) / "card.md").read_text()
    assert not [text for text in ("<script", "\u202e", "\x1b", "\u200b") if text in hostile]


def test_a_refused_run_changes_nothing_but_the_history(
    runs: tuple[Path, Path], registry: Registry, tiny_model: Path, tmp_path: Path
) -> None:
    promote(registry, runs[0], GATE)
    changes = {**passing().changes, "aligned: reasoning harm, relative drop": Rate(rate=0.5, lo=0.3, hi=0.6, n=120)}
    run = make_run(tiny_model, tmp_path / "bad", LOOPS, passing(changes=changes))
    for _ in range(2):
        assert promote(registry, run, GATE).version is None
    assert (registry.current(), registry.versions()) == (1, [1])
    refused = history(registry)[1:]
    assert [(e.event, e.version, e.before) for e in refused] == [("refused", None, 1)]
    assert refused[0].reasons == [
        "aligned: reasoning harm, relative drop: 50.0 % [30, 60] n=120, wanted low end >= 0.6"
    ]
    forced = promote(registry, run, GATE, force=True)
    assert (forced.version, registry.current(), history(registry)[-1].forced) == (2, 2, True)
    assert "**Not passed; put in force all the same (--force).**" in (registry.directory(2) / "card.md").read_text()


def test_a_version_is_held_against_the_one_in_force(
    runs: tuple[Path, Path], registry: Registry, tiny_model: Path, tmp_path: Path
) -> None:
    promote(registry, runs[0], GATE)
    arms = {**passing().arms, "aligned": arm(60, 5)}
    run = make_run(tiny_model, tmp_path / "worse", LOOPS, passing(arms=arms))
    outcome = promote(registry, run, GATE)
    assert outcome.version is None
    assert len(outcome.verdict.reasons) == 2
    roll_back(registry)
    assert promote(registry, run, GATE).version == 2


def test_promoting_again_is_no_second_version(runs: tuple[Path, Path], registry: Registry) -> None:
    for _ in range(2):
        assert promote(registry, runs[0], GATE).version == 1
    assert promote(registry, runs[1], GATE).version == 2
    assert (registry.versions(), len(history(registry))) == ([1, 2], 2)
    # What was rolled back is promoted again as what it was.
    roll_back(registry)
    assert promote(registry, runs[1], GATE).version == 2
    assert (registry.versions(), registry.current()) == ([1, 2], 2)


def test_rollback_goes_back_step_by_step(runs: tuple[Path, Path], registry: Registry) -> None:
    promote(registry, runs[0], GATE)
    promote(registry, runs[1], GATE)
    assert [roll_back(registry).version for _ in range(2)] == [1, 0]
    with pytest.raises(UserError, match="Nothing to roll back to: version 0 is in force"):
        roll_back(registry)
    assert roll_back(registry, to=2).version == 2
    with pytest.raises(UserError, match="Version 9 does not exist"):
        roll_back(registry, to=9)
    with pytest.raises(UserError, match="Version 2 is in force already"):
        roll_back(registry, to=2)
    assert [(e.event, e.before, e.version) for e in history(registry)[2:]] == [
        ("rolled back", 2, 1), ("rolled back", 1, 0), ("rolled back", 0, 2)
    ]  # fmt: skip


def test_a_crash_before_current_moved_is_mended_by_doing_it_again(runs: tuple[Path, Path], registry: Registry) -> None:
    promote(registry, runs[0], GATE)
    (registry.root / "current").unlink()
    assert promote(registry, runs[0], GATE).version == 1
    assert registry.current() == 1


def test_one_writer_at_a_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PATIENCE", 0.2)
    with locked(registry.root), pytest.raises(UserError, match="Another align is writing"), locked(registry.root):
        pass


def test_a_version_that_is_not_there_is_never_put_in_force(registry: Registry) -> None:
    with pytest.raises(UserError, match="Version 4 does not exist"):
        put_in_force(registry, Event(time=1.0, event="promoted", version=4, before=0))
    assert (registry.current(), history(registry)) == (0, [])


def test_an_unfinished_run_is_told(registry: Registry, runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*report\.json"):
        promote(registry, tmp_path, GATE)
    for name in ("report.json", "align.json"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    with pytest.raises(UserError, match="holds no trained model"):
        promote(registry, tmp_path, GATE)


def test_a_full_disk_leaves_no_half_version(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk: the kernel refuses the same `write`."""
    code = (
        "import os, resource, sys, cli\n"
        "os.link = lambda *_: (_ for _ in ()).throw(OSError('another file system'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "cli.main()\n"
    )
    root = tmp_path / "versions"
    command = ["align", "promote", "--out", str(runs[0]), "--versions", str(root)]
    full = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert sentence(full).startswith(f"error: The disk under {root} is full; got File too large. Make room and run the")
    assert [p.name for p in root.iterdir()] == [".lock"]
    assert cli(*command).returncode == 0
    assert Registry(root).current() == 1


def test_the_command_line_promotes_refuses_rolls_back_and_tells(
    runs: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "versions"
    done = cli("align", "promote", "--out", runs[0], "--versions", root)
    assert done.returncode == 0, done.stderr
    assert "passed  aligned: reasoning harm, relative drop: 80.0 % [70, 87] n=120, wanted low end >= 0.6" in done.stdout
    assert f"Version 1 is in force; its card: {root}/1/card.md" in done.stdout
    gate = tmp_path / "gate.yaml"
    gate.write_text("criteria: [{figure: aligned.quality, bound: low, at_least: 0.99}]")
    refused = cli("align", "promote", "--out", runs[1], "--versions", root, "--gate", gate)
    assert refused.returncode == 3
    assert "MISSED  aligned.quality" in refused.stdout
    # A run of another kind than the weekly one may be measured on more, so its own report says what there is.
    gate.write_text("criteria: [{figure: other.quality, bound: low, at_least: 0.99}]")
    unknown = cli("align", "promote", "--out", runs[1], "--versions", root, "--gate", gate)
    assert "no figure `other.quality`; wanted such as: " in sentence(unknown)
    assert sentence(refused, 3) == "The gate refused: what is in force stays in force."
    told = cli("align", "status", "--versions", root, "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["current"], found["versions"]) == (1, [1])
    assert [line["event"]["event"] for line in found["lines"]] == ["promoted", "refused"]
    shown = cli("align", "status", "--versions", root)
    assert "Version 1 is in force" in shown.stdout
    back = cli("align", "rollback", "--versions", root)
    assert back.stdout.strip() == "Version 0 is in force again, instead of 1."
