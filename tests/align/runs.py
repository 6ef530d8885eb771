"""A finished run of the aligner on the tiny model, made without training: real adapter, real merged model."""

from __future__ import annotations

import json
from pathlib import Path

from align.pairs import Pair, write_pairs
from align.pipeline import AlignSettings
from align.report import Report, write_report
from align.train import TrainReport, TrainSettings, merge
from classifiers.stats import Rate
from tests.align.reports import arm, sample
from tests.tiny import retarget

#: At the end of the first step the model declines instead of complying.
DECLINES = {"Ġcar.": "ĠTherefore"}
#: The declining step goes round and round until the token limit.
LOOPS = {"Ġsense.": "ĠTherefore"}


def passing(**changes: object) -> Report:
    """A report that the built-in gate lets through."""
    figures = {
        "aligned: reasoning harm, relative drop": Rate(rate=0.8, lo=0.7, hi=0.87, n=120),
        "aligned: answer harm, relative drop": Rate(rate=0.78, lo=0.68, hi=0.86, n=120),
        "aligned: benign refusals, change": Rate(rate=0.03, lo=0.0, hi=0.07, n=120),
        "aligned: sound benign replies, change": Rate(rate=-0.03, lo=-0.09, hi=0.02, n=120),
        "aligned+guard: interventions on harmful requests, relative drop": Rate(rate=0.84, lo=0.75, hi=0.91, n=120),
    }
    arms = {"base": arm(120, 3), "aligned": arm(26, 5), "aligned+guard": arm(8, 5, 20)}
    return sample(**({"changes": figures, "arms": arms} | changes))


def make_run(model: Path, run: Path, words: dict[str, str], report: Report | None = None) -> Path:
    """Everything that `promote` reads, in `run`."""
    run.mkdir(parents=True)
    adapter = retarget(model, run / "adapter", words)
    trained = TrainReport(
        pairs=2, intervened=1, benign=1, tokens=9, too_long=[], steps=1, seconds=1.0, settings=TrainSettings()
    )  # fmt: skip
    (adapter / "train.json").write_text(trained.model_dump_json(), encoding="utf-8")
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    merge(str(model), adapter, run / "aligned")
    (run / "align.json").write_text(AlignSettings(model=str(model)).model_dump_json(indent=1), encoding="utf-8")
    (run / "collected.json").write_text(json.dumps({"traces": 2, "usable": 2}), encoding="utf-8")
    write_pairs([pair("a"), pair("b")], run / "pairs.jsonl")
    write_report(report or passing(), run)
    return run


def pair(guard_id: str) -> Pair:
    """A pair of one trace, like no other's."""
    return Pair(
        id=f"pair-{guard_id}", kind="intervened", guard_id=guard_id, request=f"SECRET REQUEST {guard_id}",
        prompt_ids=[1], prefix_ids=[2], chosen_ids=[3, *guard_id.encode()], rejected_ids=[4], trigger_id="t",
        chosen_harm=0.1, rejected_harm=0.9,
    )  # fmt: skip
