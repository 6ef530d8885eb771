"""A real Chromium, driven by playwright; where there is none, tests are skipped with the reason."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextlib.contextmanager
def chromium(base_url: str, scheme: Literal["light", "dark"] = "light") -> Iterator[BrowserContext]:
    """A headless browser with a new, empty profile."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH (apt-get install chromium)")
    directory = tempfile.TemporaryDirectory(prefix="reasonguard-chromium-", ignore_cleanup_errors=True)
    with directory as profile, playwright.sync_playwright() as started:
        browser: BrowserContext = started.chromium.launch_persistent_context(
            profile, executable_path=path, headless=True, args=list(ARGUMENTS), base_url=base_url,
            viewport={"width": 1180, "height": 760}, color_scheme=scheme, timeout=120_000,
        )  # fmt: skip
        browser.set_default_timeout(60_000)
        yield browser
        browser.close()
