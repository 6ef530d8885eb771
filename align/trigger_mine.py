"""Candidates for the trigger pool: the model's own steps at which the ratio rose and stayed (paper, sections 3 and 4).

The paper mined its pool so but does not say how it chose; here sentences are normalised, near-duplicates merged, and
the rest ranked by how many requests they turned, how little they say of one request, and how far the ratio rose.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from align.csr_report import CsrReport, Turn
from align.trigger_file import MAX_CHARS, Candidate, Evidence
from classifiers.stats import Rate
from guard.triggers import POOL

#: Two sentences with this share of words in common (Jaccard) count as one.
NEAR = 0.6
MIN_WORDS = 3
_SHORT = 4


@dataclass
class _Cluster:
    text: str
    words: frozenset[str]
    turns: list[Turn] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


def mine(reports: Sequence[CsrReport]) -> tuple[list[Candidate], Counter[str]]:
    """Candidates, the best first, and why steps at safe turning points were left out."""
    dropped: Counter[str] = Counter()
    clusters: list[_Cluster] = []
    for row in (row for report in reports for row in report.reasonings):
        turn = row.turns.get("safe")
        if turn is None:
            continue
        text = normalise(turn.text)
        reason = _objection(turn, text)
        if reason:
            dropped[reason] += 1
            continue
        cluster = _nearest(text, clusters)
        cluster.turns.append(turn)
        cluster.requests.append(row.request)
        cluster.examples.append(row.id)
    found = [_candidate(cluster) for cluster in clusters]
    return sorted(found, key=_rank), dropped


def normalise(text: str) -> str:
    """One line of visible characters, compatibility forms folded, without list marks in front."""
    folded = unicodedata.normalize("NFKC", text)
    kept = "".join(c for c in folded if c.isspace() or unicodedata.category(c)[0] != "C")
    return re.sub(r"^(?:[-*•#>]+|\d+[.)])\s+", "", " ".join(kept.split()))


def words(text: str) -> frozenset[str]:
    """Its words, in small letters."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard's, 0 to 1."""
    return len(a & b) / len(a | b) if a | b else 1.0


def _objection(turn: Turn, text: str) -> str | None:
    if turn.step is None or turn.before is None:
        return "safe from the start"
    if turn.at_end:
        return "at the end"
    if turn.forced:
        return "forced by a guard"
    if len(text) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if len(words(text)) < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    if any(similarity(words(text), words(known.text)) >= NEAR for known in POOL):
        return "in the pool"
    return None


def _nearest(text: str, clusters: list[_Cluster]) -> _Cluster:
    """The cluster that this sentence belongs to, a new one if need be."""
    own = words(text)
    best = max(clusters, key=lambda cluster: similarity(own, cluster.words), default=None)
    if best is None or similarity(own, best.words) < NEAR:
        best = _Cluster(text, own)
        clusters.append(best)
    return best


def _candidate(cluster: _Cluster) -> Candidate:
    content = {word for word in cluster.words if len(word) >= _SHORT}
    shares = [len(content & words(request)) / len(content) if content else 0.0 for request in cluster.requests]
    return Candidate(
        id=f"mined-{hashlib.sha256(cluster.text.encode()).hexdigest()[:8]}", text=cluster.text,
        evidence=Evidence(
            requests=len(set(cluster.requests)), found=len(cluster.turns),
            before=_pooled([turn.before for turn in cluster.turns if turn.before]),
            after=_pooled([turn.ratio for turn in cluster.turns]),
            request_words=round(sum(shares) / len(shares), 3), example=cluster.examples[0],
        ),
    )  # fmt: skip


def _pooled(rates: Sequence[Rate]) -> Rate:
    return Rate.of(sum(round(rate.rate * rate.n) for rate in rates), sum(rate.n for rate in rates))


def _rank(candidate: Candidate) -> tuple[float, ...]:
    evidence = candidate.evidence
    if evidence is None:
        return (0.0,)
    return (-evidence.requests, evidence.request_words, evidence.before.rate - evidence.after.rate)
