"""A built model appears whole, once, whoever else builds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.model import _build_once


def test_a_build_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def half(scratch: Path) -> None:
        (scratch / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _build_once(target, half)
    assert not target.exists()
    assert _build_once(target, lambda scratch: (scratch / "config.json").write_text("whole")) == target
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    _build_once(target, half)
    assert (target / "config.json").read_text() == "whole"


def test_of_two_builds_at_once_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def slow(scratch: Path) -> None:
        (scratch / "config.json").write_text("second")
        target.mkdir()
        (target / "config.json").write_text("first")

    _build_once(target, slow)
    assert (target / "config.json").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
