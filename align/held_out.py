"""What is measured is never trained on: pairs whose request is asked in the evaluation are left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from align.disk import write_whole
from align.evaluate import EvalRequest
from align.pairs import Pair, request_key
from align.refusals import refusal_id
from guard.errors import UserError

if TYPE_CHECKING:
    from align.pipeline import Workbench

#: Directories of a run in which something may have been trained.
_TRAINED = ("adapter", "stage-*", "baselines/*/adapter")


class HeldOut(BaseModel):
    """What was left out of training: `held_out.json`."""

    model_config = ConfigDict(extra="forbid")

    pairs: int
    requests: int
    """Different requests among them."""


def keep_apart(bench: Workbench, pairs: Sequence[Pair], requests: Iterable[EvalRequest]) -> list[Pair]:
    """The pairs that may be trained on; how many are left out is told, and kept for the report.

    UserError when the run was trained on one of the others already.
    """
    asked = {request_key(request.request) for request in requests}
    left = [pair for pair in pairs if request_key(pair.request) in asked]
    known = {i for pair in left for i in (pair.id, refusal_id(pair))}
    if late := known.intersection(_trained_on(bench.out)):
        raise UserError(
            f"{bench.out} was trained on {len(late)} pairs whose requests are to be measured now",
            fix="Take their requests out of --requests, or train and measure into another --out",
        )
    counts = HeldOut(pairs=len(left), requests=len({request_key(pair.request) for pair in left}))
    write_whole(bench.out / "held_out.json", counts.model_dump_json(indent=1))
    if left:
        Console(stderr=True).print(
            f"{counts.pairs} of {len(pairs)} pairs are left out of training: they come from {counts.requests} requests "
            "that are measured", highlight=False,
        )  # fmt: skip
    return [pair for pair in pairs if request_key(pair.request) not in asked]


def left_out(out: Path) -> HeldOut | None:
    """What a run left out; None where it has not come so far."""
    path = out / "held_out.json"
    return HeldOut.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _trained_on(out: Path) -> Iterator[str]:
    """Ids of the pairs in every stage that was begun."""
    for pattern in _TRAINED:
        for file in out.glob(f"{pattern}/rows.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)["pair"]
