"""The public sets that the shipped detector learned from, and their assembly where the hub can be reached.

No text of theirs ships. A text belongs to a label when its hash does, so it does not matter how the hub orders rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from classifiers.labels import read_labels, text_hash

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


UNVERSIONED = "unversioned, read on 2026-11-24"
"""Of a set for which no public page states a version; the day is the one on which its labels were made."""


@dataclass(frozen=True)
class Source:
    """One public set; `hub` is its name there, empty where it is not on the hub."""

    name: str
    what: str
    licence: str
    where: str
    version: str
    """The commit that public pages state, 40 hex digits, or `UNVERSIONED`."""
    use: str
    hub: str = ""
    config: str | None = None
    split: str = "train"
    label: Literal["harmful", "benign"] = "harmful"
    request: str = "prompt"
    """Column of the request."""
    response: str = ""
    """Column with the reasoning, for sets of traces."""

    @property
    def revision(self) -> str | None:
        """The commit to load; None takes the newest there is, whose texts are told by their hashes."""
        return self.version if re.fullmatch("[0-9a-f]{40}", self.version) else None


SOURCES = (
    Source("star1", "DeepSeek-R1, safe deliberation, 1,000", "Apache-2.0", "hub: UCSC-VLAA/STAR-1", UNVERSIONED,
           "step labels (vectors ship)", "UCSC-VLAA/STAR-1", request="question", response="response"),
    Source("ky295_advbench", "R1-Distill-Llama-8B on AdvBench", "MIT",
           "GitHub: ky295/adv-steer, dataset/advbench_reasoning_template.csv",
           "eb87d949a0f040f3a3282a7b8c7f996ccc226d77", "step labels (vectors ship)"),
    Source("ky295_alpaca", "R1-Distill-Llama-8B on ordinary requests", "MIT",
           "GitHub: ky295/adv-steer, dataset/alpaca_reasoning_template.csv",
           "cabcdd4a2c008161fb3dd369d98d766d7632387a", "step labels (vectors ship)"),
    Source("exaone45", "EXAONE-4.5-33B on Korean requests", "MIT", "not on the hub", UNVERSIONED,
           "measuring only (vectors ship)"),
    Source("advbench", "harmful requests, 520", "MIT", "hub: walledai/AdvBench",
           "9d4730540082fa4017450b65ca1c0e1d8d30446e", "risk of requests", "walledai/AdvBench"),
    Source("coconot", "requests to decline, 395, and contrast, 148", "MIT", "hub: allenai/coconot",
           "2cbe16aabf9069f17e48c8daad8aeabc29469eb7", "risk of requests",
           "allenai/coconot", "contrast", "test", "benign"),
    Source("orbench_hard", "benign requests that sound harmful, 1,019", "CC-BY-4.0", "hub: bench-llm/or-bench",
           "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272", "risk of requests",
           "bench-llm/or-bench", "or-bench-hard-1k", label="benign"),
    Source("simplesafetytests", "harmful requests, 93", "CC-BY-4.0", "hub: Bertievidgen/SimpleSafetyTests",
           "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5", "risk of requests",
           "Bertievidgen/SimpleSafetyTests", split="test"),
)  # fmt: skip

Load = Callable[[Source], Iterable[Mapping[str, Any]]]


def load_from_hub(source: Source) -> Iterable[Mapping[str, Any]]:
    """The rows of a set on the hub in its listed version; whatever `datasets` raises when it cannot be reached."""
    from datasets import load_dataset

    return load_dataset(source.hub, source.config, split=source.split, revision=source.revision)  # type: ignore[no-any-return]


def assemble(out: Path, say: Callable[[str], None], load: Load = load_from_hub) -> list[str]:
    """Write traces.jsonl and requests.jsonl to `out` from the sets on the hub; return a line for each source.

    A source that cannot be loaded is told and left out; nothing is written when none can.
    """
    traces: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    told = []
    for source in SOURCES:
        if not source.hub:
            told.append(f"{source.name}: {source.where}; its vectors ship with the detector")
            continue
        say(source.name)
        try:
            rows = list(load(source))
            found = list(_traces(source, rows) if source.response else _requests(source, rows))
        except Exception as error:  # noqa: BLE001 - the hub, the network and other people's columns can fail in any way
            told.append(f"{source.name}: not assembled ({type(error).__name__}: {str(error)[:120]})")
            continue
        (traces if source.response else requests).extend(found)
        told.append(f"{source.name} ({source.revision or 'newest version'}): {len(found)} of {len(rows)} rows")
    for name, lines in (("traces.jsonl", traces), ("requests.jsonl", requests)):
        if lines:
            out.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (out / name).write_text(text, encoding="utf-8")
            told.append(f"{out / name}: {len(lines)} lines")
    return told


def _traces(source: Source, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows whose reasoning a label was made for, under the label's id."""
    ids = {row.sha256: row.id for row in read_labels() if row.source == source.name}
    for row in rows:
        match = _THINK.search(str(row[source.response]))
        whole = match.group(1) if match else str(row[source.response])
        for reasoning in (whole, whole.strip()):
            if text_hash(reasoning) in ids:
                yield {
                    "id": ids[text_hash(reasoning)], "source": source.name, "request": row[source.request],
                    "request_label": source.label, "reasoning": reasoning,
                }  # fmt: skip
                break


def _requests(source: Source, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "request": row[source.request], "label": source.label, "source": source.name, "licence": source.licence,
        }  # fmt: skip
