"""The table of engine features: in the docs as it is in code, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

from guard.engine.matrix import FEATURES, markdown

ROOT = Path(__file__).resolve().parents[3]


def test_the_docs_hold_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def test_every_feature_names_a_test_that_exists() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "guard").rglob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    assert {row.test for row in FEATURES} <= known


def test_nothing_is_left_open_through_serve() -> None:
    assert {row.sidecar for row in FEATURES} <= {"enforced", "refused at start", "refused per request"}
