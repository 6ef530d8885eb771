"""The second stage's benign pairs: the base model's normal answer against the first stage's refusal.

Training on intervened pairs alone makes a model refuse too much. What it refuses tells what to train against (paper,
section 5 and appendix A.2): each benign pair keeps its chosen side, and its rejected side becomes what the trained
model goes on to say after the same prefix, where the judge calls that a refusal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from align.generate import Generator, Job
from align.pairs import Pair, pair_id
from align.text import ReplyReader
from classifiers.judge import Judge


def refusal_id(pair: Pair) -> str:
    """Of the pair that a benign one becomes."""
    return pair_id(pair.id, "refusal")


def refusal_jobs(pairs: Sequence[Pair], max_tokens: int) -> list[Job]:
    """What the trained model is asked to go on with: benign pairs' prefixes."""
    return [Job(id=p.id, prompt_ids=[*p.prompt_ids, *p.prefix_ids], max_tokens=max_tokens) for p in pairs]


def refusals(
    pairs: Sequence[Pair], generator: Generator, reader: ReplyReader, judge: Judge, out: Path, *, max_tokens: int
) -> tuple[list[Pair], Counter[str]]:
    """Benign pairs rejected by what `generator`'s model says, and why the others were dropped.

    Resumable from `out`, where `refusals.jsonl` (generations) and `refusals.json` (counts) go.
    """
    benign = [pair for pair in pairs if pair.kind == "benign"]
    label = "what the trained model refuses to benign requests"
    results = generator.generate(refusal_jobs(benign, max_tokens), out / "refusals.jsonl", label)
    replies = [reader.read([*p.prefix_ids, *results[p.id].output_ids]) for p in benign]
    verdicts = judge.judge([(p.request, r.reasoning, r.answer) for p, r in zip(benign, replies, strict=True)])
    found, counts = [], Counter[str]()
    for pair, verdict in zip(benign, verdicts, strict=True):
        said = results[pair.id].output_ids
        common = _common(pair.chosen_ids, said)
        if verdict.refusal < 0.5:
            counts["answered"] += 1
        elif common in (len(said), len(pair.chosen_ids)):
            counts["sides do not part"] += 1
        else:
            counts["refused"] += 1
            changed = {
                "id": refusal_id(pair), "prefix_ids": pair.prefix_ids + said[:common],
                "chosen_ids": pair.chosen_ids[common:], "rejected_ids": said[common:],
                "rejected_harm": verdict.reasoning_harm,
            }  # fmt: skip
            found.append(pair.model_copy(update=changed))
    (out / "refusals.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")
    return found, counts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
