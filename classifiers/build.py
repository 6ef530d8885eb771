"""From labelled traces to an artifact: fine-tune or keep the encoder, train the heads, calibrate, choose the
thresholds on the validation part, measure on the frozen test part, write."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from classifiers.artifact import Manifest, load_files
from classifiers.corpus import UNSEEN_LANGUAGES, UNSEEN_SOURCES, Corpus
from classifiers.data import LabelledRequest
from classifiers.detector import (
    ENCODER_FILE,
    FIRST_FILE,
    GLOSSARY_FILE,
    HEAD_FILE,
    REPLAY_FILE,
    REQUEST_FILE,
    TOKENIZER_FILE,
    Detector,
    view_of,
)
from classifiers.encoder import Encoder
from classifiers.encoder_export import export_encoder, export_heads, quantise, read_heads
from classifiers.export import compare_scores, write_artifact
from classifiers.first_tier import FIRST_FEATURES, choose_clearing, fit_first_tier, fit_request_tier
from classifiers.gloss import pack_glossaries
from classifiers.head_fit import HeadConfig, calibrate, fit_heads
from classifiers.labels import Kind, LabelledTrace
from classifiers.measure import Scored, calibration, choose_threshold, figures
from classifiers.network import Heads, StepNetwork
from classifiers.stats import Rate
from classifiers.tune import TuneConfig, Tuned, tune
from classifiers.vectors import EncodedTrace, RiskVectors, encode_requests, encode_traces, pack, unpack
from classifiers.wrapped import Wrapper, small_talk

Say = Callable[[str], None]
_BUCKETS = len(FIRST_FEATURES.risk_edges) + 1
_DRAFT = Manifest(
    kind="detector", version="draft", files={}, features=FIRST_FEATURES, threshold=0.5, clear_below=(0.0,) * _BUCKETS,
    cleared_score=(0.0,) * _BUCKETS, training_data="", training={}, created="", metrics={},
)  # fmt: skip
"""Of a detector whose thresholds are to be chosen: it clears no step."""
PARITY = 1e-4
"""Largest difference allowed between the heads in torch and in onnxruntime."""
PUBLIC = frozenset({"star1", "ky295_advbench", "ky295_alpaca", "exaone45"})
"""Sources whose texts do not ship; their vectors do."""
SHIPPED = frozenset({"pairs", "small_talk"})
"""Sources of requests that ship as text."""


@dataclass(frozen=True)
class BuildConfig:
    """Settings of one build."""

    seed: int = 0
    fpr: float = 0.01
    """Share of ordinary benign requests that may hold a step above the threshold."""
    fpr_alarming: float = 0.05
    """The same of benign requests that sound harmful."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)

    @property
    def allowed(self) -> dict[Kind, float]:
        """False alarms by kind of request."""
        return {"benign": self.fpr, "alarming": self.fpr_alarming}


@dataclass(frozen=True)
class Material:
    """What the heads need of an encoder: its files, the first tier, and the traces and requests as vectors."""

    files: dict[str, bytes]
    traces: Sequence[EncodedTrace]
    risk: RiskVectors
    start: Heads | None = None
    """Heads to go on training from."""
    wrapped: Sequence[EncodedTrace] = ()
    """Copies of those that have their text, under wrapped requests: learned from, never measured."""

    def of(self, part: str) -> list[EncodedTrace]:
        """Traces of one part."""
        return [each for each in self.traces if each.part == part]

    def shown(self, part: str) -> list[EncodedTrace]:
        """Traces of one part and their wrapped copies."""
        return [each for each in (*self.traces, *self.wrapped) if each.part == part]


def tune_network(corpus: Corpus, base: Path, config: BuildConfig, tick: Callable[[int, int, str], None]) -> Tuned:
    """Fine-tune the pretrained encoder on the training part; the epoch follows from the validation part's AUROCs."""
    validation = corpus.part("val")

    @torch.no_grad()
    def validate(network: StepNetwork) -> float:
        scored = [_score_in_torch(network, trace) for trace in validation]
        found = figures(scored, 0.5)
        return float(np.mean([rate.rate for name, rate in found.items() if name.startswith("auroc_cue_vs_")]))

    return tune(base, corpus.part("train"), corpus.requests, validate, config.tune, tick)


def _score_in_torch(network: StepNetwork, trace: LabelledTrace) -> Scored:
    steps = network.embed(trace.steps)
    previous = torch.cat([torch.zeros_like(steps[:1]), steps[:-1]])
    scores = network.heads(steps, previous, network.embed([trace.request]).expand_as(steps))[:, 0]
    return Scored(trace, scores.numpy().astype(float), np.arange(1, len(scores) + 1), "val")


def encode_with(network: StepNetwork, corpus: Corpus, say: Say) -> Material:
    """Export a fine-tuned encoder and embed everything with what the runtime will run."""
    say("exporting the encoder")
    files = {
        ENCODER_FILE: quantise(export_encoder(network)),
        TOKENIZER_FILE: network.tokenizer_json.encode(),
        GLOSSARY_FILE: pack_glossaries(),
    }
    say("training the first tier")
    files[FIRST_FILE] = fit_first_tier(corpus.part("train"), view_of(files))
    files[REQUEST_FILE] = fit_request_tier(_asked(corpus), view_of(files))
    traces, risk, wrapped = _encode(files, corpus.traces, corpus.requests, say)
    public = [each for each in traces if each.trace.source in PUBLIC]
    if public:
        # Those after the requests themselves are wrapped.
        known = [i for i, row in enumerate(corpus.requests) if row.source not in SHIPPED]
        files[REPLAY_FILE] = pack(public, RiskVectors(risk.vectors[known], risk.harmful[known]))
    return Material(files, traces, risk, None, wrapped)


def _asked(corpus: Corpus) -> list[tuple[str, bool]]:
    """All requests that are learned from, alone and wrapped, and whether each is harmful."""
    train = corpus.part("train")
    rows = [(trace.request, trace.kind == "harmful") for trace in train]
    rows += [(row.request, row.label == "harmful") for row in corpus.requests]
    wrapper, rng = Wrapper(train), random.Random(0)
    return [*rows, *((wrapper.diluted(request, rng), harmful) for request, harmful in rows)]


def encode_kept(source: Path, corpus: Corpus, say: Say) -> Material:
    """Take encoder, first tier and public vectors from an artifact and embed the rest of the corpus."""
    _, files = load_files(source, "detector")
    known, asked = unpack(files[REPLAY_FILE]) if REPLAY_FILE in files else ([], None)
    ids = {each.trace.id for each in known}
    fresh = [trace for trace in corpus.traces if trace.id not in ids]
    traces, risk, wrapped = _encode(files, fresh, corpus.requests, say)
    start = read_heads(files[HEAD_FILE])
    return Material(dict(files), [*known, *traces], risk if asked is None else asked.joined(risk), start, wrapped)


def _encode(
    files: dict[str, bytes], traces: Sequence[LabelledTrace], requests: Sequence[LabelledRequest], say: Say
) -> tuple[list[EncodedTrace], RiskVectors, list[EncodedTrace]]:
    """Traces and requests as vectors, the requests once more wrapped, and the traces' wrapped copies."""
    encoder = Encoder(files[ENCODER_FILE], files[TOKENIZER_FILE], ENCODER_FILE, view_of(files))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 50 == 0 or done == len(traces):
            say(f"embedding traces, {done} of {len(traces)}")

    encoded = encode_traces(encoder, traces, tick)
    wrapper, rng = Wrapper([each.trace for each in encoded if each.part == "train"]), random.Random(0)
    copies = _wrapped(encoder, encoded, wrapper, rng)
    if not requests:
        width = len(encoder.embed("a"))
        return encoded, RiskVectors(np.zeros((0, width), np.float32), np.zeros(0, np.float32)), copies
    say(f"embedding {len(requests)} requests")
    texts = [*(row.request for row in requests), *(wrapper.diluted(row.request, rng) for row in requests)]
    harmful = np.array([row.label == "harmful" for row in (*requests, *requests)], np.float32)
    return encoded, RiskVectors(encode_requests(encoder, texts), harmful), copies


def _wrapped(
    encoder: Encoder, traces: Sequence[EncodedTrace], wrapper: Wrapper, rng: random.Random
) -> list[EncodedTrace]:
    """Of each trace that is not measured a copy under a diluted request; of a benign one another under small talk."""
    found: list[EncodedTrace] = []
    for each in (each for each in traces if each.part != "test"):
        requests = [wrapper.diluted(each.trace.request, rng)]
        requests += [rng.choice(small_talk())] if each.trace.kind == "benign" else []
        found += [replace(each, request=encoder.embed(request)) for request in requests]
    return found


def finish(
    material: Material,
    out: Path,
    config: BuildConfig,
    say: Say,
    told: dict[str, str | int | float],
    heads: Heads | None = None,
) -> Manifest:
    """Calibrate the heads, choose thresholds, write the artifact to `out`, and say how good it is.

    `heads` are those that were trained together with the encoder; without them new ones are trained on the vectors.
    """
    validation = material.of("val")
    if heads is None:
        say("training the heads")
        heads = fit_heads(
            material.shown("train"),
            material.shown("val"),
            material.risk,
            config.heads,
            lambda n, of, what: say(f"heads, {n} of {of}: {what}"),
            material.start,
        )
    calibrate(heads, validation, material.risk)
    files = material.files | {HEAD_FILE: export_heads(heads)}
    say("choosing thresholds")
    draft = Detector(_DRAFT, files, out)
    scored = score_encoded(draft, validation)
    threshold = choose_threshold(scored, config.allowed)
    say("measuring")
    return write_artifact(
        out,
        "detector",
        files,
        lambda staged: _check(staged, heads, validation),
        features=FIRST_FEATURES,
        threshold=threshold,
        clearing=_clearing(draft, scored, threshold),
        training_data=data_hash_of(material),
        training=told
        | {"seed": config.seed, "fpr": config.fpr, "fpr_alarming": config.fpr_alarming}
        | _counts(material),
        metrics=lambda staged: measure(Detector.load(staged), material.of("test")),
    )


def _clearing(draft: Detector, scored: Sequence[Scored], threshold: float) -> list[tuple[float, float]]:
    """The first tier's thresholds; `scored`: the validation part, of whose steps none was cleared."""
    rows: list[tuple[float, float, float, float]] = []
    for each in scored:
        if any(each.trace.steps):
            context = draft.request(each.trace.request)
            found = draft.first_tier(each.trace.steps, context)
            rows += [
                (first, full, float(label == "cue"), context.bucket)
                for first, full, label in zip(found, each.scores, each.trace.labels, strict=True)
                if first is not None
            ]
    first, full, cue, buckets = np.array(rows).T
    return choose_clearing(first, full, cue, buckets, threshold, _BUCKETS)


def _check(staged: Path, heads: nn.Module, validation: Sequence[EncodedTrace]) -> None:
    detector = Detector.load(staged)
    for each in validation[:20]:
        with torch.inference_mode():
            request = torch.from_numpy(each.request).expand(len(each.steps), -1)
            wanted = heads(torch.from_numpy(each.steps), torch.from_numpy(each.previous), request)[:, 0].numpy()
        compare_scores(detector.score_vectors(each.request, each.steps, each.previous), wanted, PARITY)


def score_encoded(detector: Detector, traces: Sequence[EncodedTrace]) -> list[Scored]:
    """Score traces as the guard would: with both tiers where there is text, else from their vectors."""
    found = []
    for each in traces:
        if any(each.trace.steps):
            scores = detector.score(detector.request(each.trace.request), each.trace.steps)
        else:
            scores = detector.score_vectors(each.request, each.steps, each.previous)
        found.append(Scored(each.trace, scores.astype(float), each.ends, each.part))
    return found


def measure(detector: Detector, test: Sequence[EncodedTrace]) -> dict[str, Rate]:
    """All figures of the test part, and of its unseen family and language apart."""
    scored = score_encoded(detector, test)
    found = figures(scored, detector.threshold)
    if scored:
        found["calibration_error"] = calibration(scored)
    for name, kept in (
        ("unseen_family", [each for each in scored if each.trace.source in UNSEEN_SOURCES]),
        (
            "unseen_language",
            [each for each in scored if each.trace.language in UNSEEN_LANGUAGES and each.trace.source != "own"],
        ),
    ):
        found |= {f"{key}_{name}": rate for key, rate in figures(kept, detector.threshold).items()} if kept else {}
    return found


def float_loss(network: StepNetwork, out: Path, corpus: Corpus, say: Say) -> dict[str, Rate]:
    """Figures of the test part with the encoder in float32 and in int8, under the artifact's heads and threshold."""
    detector = Detector.load(out)
    exact = Encoder(export_encoder(network), network.tokenizer_json.encode(), "float32", network.view)
    sides = {"float32": exact, "int8": detector.encoder}
    found: dict[str, Rate] = {}
    for name, encoder in sides.items():
        say(f"embedding in {name}")
        scored = [
            Scored(each.trace, detector.score_vectors(each.request, each.steps, each.previous), each.ends)
            for each in encode_traces(encoder, corpus.part("test"))
        ]
        measured = figures(scored, detector.threshold)
        found |= {f"{key}_{name}": measured[key] for key in _LOSS if key in measured}
    return dict(sorted(found.items()))


_LOSS = ("recall_complying_traces", "flagged_alarming_traces", "auroc_cue_vs_benign", "auroc_cue_vs_deliberation")


def _counts(material: Material) -> dict[str, str | int | float]:
    counts: dict[str, str | int | float] = {"requests": len(material.risk.harmful)}
    for part in ("train", "val", "test"):
        traces = material.of(part)
        counts |= {f"{part}_traces": len(traces), f"{part}_steps": sum(len(each.steps) for each in traces)}
    return counts


def data_hash_of(material: Material) -> str:
    """sha256 over ids, parts and labels of all traces, and over the requests' vectors and labels."""
    digest = hashlib.sha256()
    for each in material.traces:
        labels = ["" if i in each.trace.unlabelled else label for i, label in enumerate(each.trace.labels)]
        digest.update(f"{each.trace.id}\0{each.part}\0{','.join(labels)}\n".encode())
    for column in (material.risk.vectors, material.risk.harmful):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
