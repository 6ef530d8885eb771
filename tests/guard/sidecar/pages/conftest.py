from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guard.sidecar.pages.kit import Pages, opened


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[Pages]:
    """Pages over an empty SQLite store, nobody logged in."""
    with opened(tmp_path) as pages:
        yield pages


@pytest.fixture
def pages(nobody: Pages) -> Pages:
    """The same, `ann` logged in."""
    assert nobody.log_in().status_code == 303
    return nobody
