"""Which traces a registry's runs have consumed, so that a weekly run takes the new ones only.

`DIR/consumed.jsonl` has one line a finished run: its directory and the guard ids it took. What an unfinished run took
is in `OUT/taken.json`; run again, it takes exactly that, and the stages go on where they stopped. Pairs of earlier runs
are trained on again, because every version is trained from the model as it came: after the run's own, within the same
quotas, and as far as a stage's `max_pairs` goes (`align.train.mix`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from align.disk import append_line, read_lines
from align.pairs import Pair, Quota, dedupe, read_pairs, write_pairs
from guard.traces import Trace

EARLIER = "earlier_pairs.jsonl"
"""In a run's directory: the pairs of the runs before it that it trains on too."""


class Consumed(BaseModel):
    """One line of `consumed.jsonl`."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """The run's directory, absolute."""
    base: str
    """`weights_hash` of the model that was trained."""
    guard_ids: list[str]


class Watermark:
    """The consumed traces of one registry and one model."""

    def __init__(self, root: Path, base: str) -> None:
        self._path, self._base = root / "consumed.jsonl", base
        self._runs = [run for run in read_lines(self._path, Consumed) if run.base == base]

    @property
    def runs(self) -> list[Path]:
        """Directories of the finished runs, the newest first; some may have been deleted."""
        return [Path(run.run) for run in reversed(self._runs)]

    def finished(self, out: Path) -> bool:
        """Whether the run in `out` has had its verdict."""
        return any(run.run == str(out.resolve()) for run in self._runs)

    def new(self, traces: Sequence[Trace]) -> list[Trace]:
        """Traces that no finished run took."""
        taken = {guard_id for run in self._runs for guard_id in run.guard_ids}
        return [trace for trace in traces if trace.guard_id not in taken]

    def take(self, traces: Sequence[Trace], out: Path) -> list[Trace]:
        """The new traces, remembered in `out`; an interrupted run gets those that it took before."""
        path = out / "taken.json"
        if path.exists():
            taken = set(json.loads(path.read_text(encoding="utf-8")))
            return [trace for trace in traces if trace.guard_id in taken]
        found = self.new(traces)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps([trace.guard_id for trace in found]), encoding="utf-8")
        scratch.replace(path)
        return found

    def earlier_pairs(self, out: Path, own: Sequence[Pair]) -> list[Pair]:
        """Pairs of the finished runs whose directories are still there, the newest run's first. What repeats a pair of
        `own`, or would break a quota together with them, is left out. Kept in `out`, so that an interrupted run trains
        on the same."""
        kept = out / EARLIER
        if not kept.exists():
            files = [run / "pairs.jsonl" for run in self.runs]
            found = _earlier([pair for file in files if file.exists() for pair in read_pairs(file)])
            wanted, _ = dedupe([*own, *found], _quota(out))
            write_pairs([pair for pair in wanted if pair.earlier], kept)
        return _earlier(read_pairs(kept))

    def commit(self, out: Path) -> None:
        """From now on the traces that `out` took count as consumed."""
        if not self.finished(out):
            taken = json.loads((out / "taken.json").read_text(encoding="utf-8"))
            run = Consumed(run=str(out.resolve()), base=self._base, guard_ids=taken)
            append_line(self._path, run.model_dump_json())
            self._runs.append(run)


def _earlier(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair.model_copy(update={"earlier": True}) for pair in pairs]


def _quota(out: Path) -> Quota:
    """What the run's own pairs were kept to."""
    path = out / "pairs.settings.json"
    return Quota.model_validate(json.loads(path.read_text(encoding="utf-8"))["quota"]) if path.exists() else Quota()
