"""The demo's topics: what is asked, on both sides of the line, split once by topic into five disjoint parts.

Every row was written for this project. A harmful topic states an intent and three empty stage names; it never holds
know-how. `demo/data/splits.json` fixes which part a topic belongs to; `python -m demo.topics` writes it anew (only
needed after topics were added) and `tests/demo/test_topics.py` proves that no near-duplicate crosses two parts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

DATA = Path(__file__).parent / "data"
Split = Literal["reasoner", "lookalike", "detector", "align", "report"]
Kind = Literal["harmful", "benign", "alarming"]

#: Share of each part, filled per kind in the order of the cluster hash.
SHARES: dict[Kind, dict[Split, float]] = {
    "harmful": {"reasoner": 0.40, "detector": 0.15, "align": 0.26, "report": 0.19},
    "benign": {"reasoner": 0.38, "detector": 0.17, "align": 0.27, "report": 0.18},
    "alarming": {"reasoner": 0.38, "detector": 0.15, "align": 0.29, "report": 0.18},
}
#: Pairs of a harmful and an alarming topic that share words and differ in intent. Only the reasoner learns them: what
#: else is made of the topics came before them.
LOOKALIKE_IDS = ("hc-", "ac-")
#: Two topics this similar (Jaccard of content-word stems of goal or request) always share a part.
NEAR = 0.5

_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "can",
        "do",
        "does",
        "for",
        "from",
        "get",
        "have",
        "how",
        "i",
        "i'd",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "of",
        "on",
        "or",
        "our",
        "so",
        "some",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "to",
        "up",
        "want",
        "was",
        "what",
        "when",
        "which",
        "who",
        "will",
        "with",
        "without",
        "you",
        "your",
        "help",
        "show",
        "tell",
        "write",
        "give",
        "need",
        "like",
        "would",
        "could",
        "best",
        "way",
        "someone",
        "somebody",
        "make",
    ]
)


class Topic(BaseModel):
    """One topic: two ways to ask for it and the phrases its reasoning is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: Kind
    area: str
    request: str
    request2: str
    goal: str
    stages: tuple[str, str, str]
    harm: str = ""
    use: str = ""
    sense: str = ""


def all_topics() -> list[Topic]:
    """Every topic of `demo/data/topics_*.jsonl`, in file order."""
    return [
        Topic.model_validate_json(line)
        for path in sorted(DATA.glob("topics_*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def load_topics(split: Split) -> list[Topic]:
    """The topics of one part; a topic without a part in `splits.json` is a KeyError."""
    parts: dict[str, str] = json.loads((DATA / "splits.json").read_text(encoding="utf-8"))
    return [topic for topic in all_topics() if parts[topic.id] == split]


@functools.cache
def stems(text: str) -> frozenset[str]:
    """Content words of a text, cut to crude stems: what near-duplicates share."""
    words = re.findall(r"[a-z']+", text.lower())
    return frozenset(re.sub(r"(ing|ed|es|s|er)$", "", w) for w in words if w not in _STOP and len(w) > 2)


def similarity(a: Topic, b: Topic) -> float:
    """Largest Jaccard similarity of the two topics' goals and requests, 0 to 1."""
    pairs = [(a.goal, b.goal)] + [(x, y) for x in (a.request, a.request2) for y in (b.request, b.request2)]
    return max(_jaccard(stems(x), stems(y)) for x, y in pairs)


def clusters(topics: Iterable[Topic]) -> list[list[Topic]]:
    """Topics grouped so that near-duplicates (similarity >= NEAR, transitively) lie together."""
    items = list(topics)
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, a in enumerate(items):
        for j in range(i):
            if similarity(a, items[j]) >= NEAR:
                parent[root(i)] = root(j)
    groups: dict[int, list[Topic]] = {}
    for i, topic in enumerate(items):
        groups.setdefault(root(i), []).append(topic)
    return list(groups.values())


def assign_splits(topics: list[Topic]) -> dict[str, Split]:
    """Topic id -> part; whole clusters go to the part that is furthest below its share of their kind, lookalikes to
    their own."""
    parts: dict[str, Split] = {t.id: "lookalike" for t in topics if t.id.startswith(LOOKALIKE_IDS)}
    topics = [t for t in topics if t.id not in parts]
    totals: dict[Kind, int] = {kind: sum(t.kind == kind for t in topics) for kind in SHARES}
    have: dict[tuple[Kind, Split], int] = {}
    for group in sorted(clusters(topics), key=lambda g: hashlib.sha256(g[0].id.encode()).digest()):
        kind = group[0].kind
        split = max(SHARES[kind], key=lambda s: SHARES[kind][s] - have.get((kind, s), 0) / totals[kind])
        for topic in group:
            parts[topic.id] = split
            have[topic.kind, split] = have.get((topic.kind, split), 0) + 1
    return parts


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


if __name__ == "__main__":
    path = DATA / "splits.json"
    path.write_text(json.dumps(assign_splits(all_topics()), indent=0, sort_keys=True) + "\n", encoding="utf-8")
