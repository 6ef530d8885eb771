"""The page of versions finds what `align status` finds."""

from __future__ import annotations

from pathlib import Path

from align.status import status
from guard.sidecar.pages.versions import changes
from guard.weights import Registry
from tests.align.test_status import log
from tests.align.test_status import registry as registry  # the fixture: versions 1 and 2, and back to 1
from tests.guard.sidecar.pages.kit import opened, text_of


def test_versions_have_the_rates_that_align_status_finds(registry: Registry, tmp_path: Path) -> None:
    spool = tmp_path / "spool-of-versions"
    for weights, created, n, intervened in (
        ("w0", 50, 20, 10), ("w0", 101, 5, 5), ("w1", 150, 40, 4), ("w2", 250, 30, 0), ("w1", 350, 10, 3),
    ):  # fmt: skip
        log(spool, weights, created, n, intervened)
    log(spool, "w2", 261, 3, 3, shadow=True)
    (tmp_path / "pages").mkdir()
    with opened(tmp_path / "pages", registry=registry) as pages:
        for file in spool.iterdir():
            (pages.spool / file.name).write_bytes(file.read_bytes())
        pages.feed()
        found = changes(pages.store, registry)[::-1]
        expected = status(registry, spool).lines
        assert [c.gate for c in found] == [line.gate for line in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for mine, other in ((ours.before, theirs.interventions_before), (ours.after, theirs.interventions_after)):
                assert mine is not None
                assert other is not None
                assert (round(1000 * mine.rate, 6), mine.n) == (round(other.rate, 6), other.n)
        assert pages.log_in().status_code == 303
        page = text_of(pages.get("/versions"))
        assert "Version 1 is in force" in page
        assert "promoted 0 → 1 5 of 5 met 60.0 % [40.7, 76.6] 25 10.0 % [4.0, 23.1] 40" in page
        assert "0 (as it came) 25" in text_of(pages.get("/?window=all&by=version"))
