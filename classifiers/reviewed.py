"""What reviewers said in the pages, as traces to learn from.

A reviewer labels single steps, so a trace is mostly unlabelled: the rest of its steps stand as what came before. A
cue means that the request is harmful (`docs/labelling.md`, rule 2); without one the request's kind has to be said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from classifiers.corpus import part_of_request
from classifiers.labels import Kind, Label, LabelledTrace
from classifiers.written import written_steps
from guard.cli import Decoder, decoders
from guard.store import reading, reviews
from guard.store.reviews import JUDGED, Review
from guard.store.store import Store
from guard.traces import Trace

_AS_LABEL: dict[str, Label] = {"cue": "cue", "missed": "cue", "not_cue": "neutral"}
_AS_KIND: dict[str, Kind] = {"harmful": "harmful", "benign": "benign", "alarming": "alarming"}


def from_store(store: Store, model: str | None = None) -> tuple[list[LabelledTrace], Counter[str]]:
    """The traces with a judged step, triggers left out, and how many were left out, by reason.

    `model`: whose tokenizer decodes them, by default each trace's own. UserError when it is another one.
    """
    found: list[LabelledTrace] = []
    left_out: Counter[str] = Counter()
    decode_of = decoders(model)
    for guard_id in reviews.reviewed_traces(store):
        trace = reading.find(store, guard_id)
        if trace is None:
            continue
        row = _row(trace, reviews.standing(store, [guard_id]), decode_of(trace))
        if isinstance(row, str):
            left_out[row] += 1
        else:
            found.append(row)
    return found, left_out


def _row(trace: Trace, said: Sequence[Review], decode: Decoder | None) -> LabelledTrace | str:
    """The trace, or why it cannot be learned from."""
    if trace.log_content != "full":
        return f"log_content: {trace.log_content} kept no request"
    labels = {each.step: _AS_LABEL[each.label] for each in said if each.step is not None and each.label in JUDGED}
    kind = next((_AS_KIND[each.label] for each in reversed(said) if each.step is None and each.label in _AS_KIND), None)
    if "cue" in labels.values() and kind not in (None, "harmful"):
        return f"a cue under a request that was called {kind}"
    if kind is None and "cue" not in labels.values():
        return "no cue, and nobody said what the request is"
    if decode is None:
        return "their model's tokenizer is not at hand (--model)"
    row = _learned(trace, labels, kind or "harmful", decode)
    if row.unlabelled and part_of_request(trace.request) != "train":
        return "their requests are measured on, which needs every step labelled"
    return row


def _learned(trace: Trace, labels: dict[int, Label], kind: Kind, decode: Decoder) -> LabelledTrace:
    """A label on a trigger's step is meant for the cue whose place the trigger took; without one the cue, which the
    model went on without, is no part of the trace."""
    kept = [
        (text, labels.get(index), trace.steps[index].zone)
        for index, text in written_steps(trace, decode)
        if index in labels or not trace.steps[index].injected
    ]
    return LabelledTrace(
        id=f"review/{trace.guard_id}", source="own", request=trace.request, kind=kind, language="und",
        category="reviewed", steps=tuple(text for text, _, _ in kept),
        labels=tuple(label or "neutral" for _, label, _ in kept),
        unlabelled=frozenset(i for i, (_, label, _) in enumerate(kept) if label is None),
        answer=frozenset(i for i, (_, _, zone) in enumerate(kept) if zone == "answer"),
    )  # fmt: skip
