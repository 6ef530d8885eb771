"""The model card of a version: figures with n and interval, gate, training, provenance as counts and hashes."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from align.figures import show, unit_of
from align.gate import Verdict
from align.pairs import read_pairs
from align.report import COLUMNS, Report, cells, ordered, visible
from align.train import read_report
from align.watermark import EARLIER
from guard.errors import UserError
from guard.weights import Manifest, file_hash


class Data(NamedTuple):
    """One line of provenance."""

    name: str
    size: int
    """How many there are."""
    sha256: str


def render_card(manifest: Manifest, report: Report, verdict: Verdict, run: Path) -> str:
    """Markdown. Names and commands are data too: what could break out of a cell or hide is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    training = read_report(run / "adapter")
    if training is None:
        raise UserError(f"{run} holds no finished training", fix="Run `cli.py align` on it first")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), undefined=StrictUndefined, finalize=plain,
        trim_blocks=True, lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    return environment.get_template("version.md.j2").render(
        manifest=manifest, report=report, verdict=verdict, training=training, data=provenance(run),
        collected=json.loads((run / "collected.json").read_text(encoding="utf-8")),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(manifest.created)),
        arms=ordered(report.arms), columns=COLUMNS, cells=cells, show=show, unit_of=unit_of,
    )  # fmt: skip


def provenance(run: Path) -> list[Data]:
    """The pairs and the traces behind them, and the report, each with a hash that tells whether it is the same."""
    found, ids = [], set()
    for name, file in (("preference pairs", run / "pairs.jsonl"), ("pairs of earlier runs", run / EARLIER)):
        if file.exists():
            pairs = read_pairs(file)
            ids |= {pair.guard_id for pair in pairs}
            found.append(Data(name, len(pairs), file_hash(file)))
    traces = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    return [
        *found,
        Data("traces behind them (their ids)", len(ids), traces),
        Data("report", 1, file_hash(run / "report.json")),
    ]


def plain(value: object) -> object:
    """A string that is only text in Markdown: one line, nothing hidden, no markup, no end of a table's cell."""
    if not isinstance(value, str):
        return value
    flat = visible(" ".join(value.split()))
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
