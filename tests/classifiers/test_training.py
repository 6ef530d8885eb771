"""Fine-tuning, heads, vectors and the artifact that comes of them, on the tiny encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from classifiers.artifact import load_files, version_of
from classifiers.build import encode_kept, finish, score_encoded
from classifiers.corpus import Corpus, part_of_request
from classifiers.detector import ENCODER_FILE, GLOSSARY_FILE, REPLAY_FILE, REQUEST_FILE, TOKENIZER_FILE, Detector
from classifiers.encoder import Encoder
from classifiers.encoder_export import export_encoder, export_heads, quantise, read_heads
from classifiers.export import compare_scores
from classifiers.first_tier import ENOUGH, HIGHEST, choose_clearing
from classifiers.head_fit import HeadConfig, calibrate, fit_heads, score_traces
from classifiers.measure import choose_threshold
from classifiers.network import Heads, StepNetwork, base_directory
from classifiers.vectors import KINDS, RiskVectors, encode_traces, pack, unpack
from guard.errors import UserError
from tests.classifiers.conftest import TINY, tiny_traces

TEXTS = ["Short.", "A somewhat longer sentence with more words in it.", "Short.", "你好，世界"]


@pytest.fixture(scope="module")
def network(tiny_base: Path) -> StepNetwork:
    return StepNetwork(tiny_base, 2).eval()


def test_batched_vectors_are_those_of_each_text_alone(network: StepNetwork) -> None:
    """Padding, sorting and the cache of the frozen layers change nothing; the encoder itself says what is right."""
    with torch.no_grad():
        batch = network.embed(TEXTS)
        for text, vector in zip(TEXTS, batch, strict=True):
            ids = torch.tensor([network._tokenizer.encode(network.view(text)).ids])
            alone = network.encoder(input_ids=ids).last_hidden_state.mean(1)[0]
            assert torch.allclose(vector, alone, atol=1e-5)


def test_the_exported_encoder_gives_the_networks_vectors(network: StepNetwork) -> None:
    tokenizer = network.tokenizer_json.encode()
    payload = export_encoder(network)
    exact, small = (
        Encoder(payload, tokenizer, "float", network.view),
        Encoder(quantise(payload), tokenizer, "int8", network.view),
    )
    with torch.no_grad():
        wanted = network.embed(TEXTS).numpy()
    for text, vector in zip(TEXTS, wanted, strict=True):
        assert np.abs(exact.embed(text) - vector).max() < 1e-5
        cosine = float(small.embed(text) @ vector / np.linalg.norm(small.embed(text)) / np.linalg.norm(vector))
        assert cosine > 0.98


def test_what_others_log_is_not_silenced_by_an_export(network: StepNetwork, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        quantise(export_encoder(network))
        logging.getLogger("guard").warning("heard")
    assert [record.getMessage() for record in caplog.records] == ["heard"]


def test_heads_trained_with_heavier_cues_call_more_steps_cues(tiny: Path) -> None:
    encoder = Detector.load(tiny).encoder
    traces = encode_traces(encoder, tiny_traces())
    risk = RiskVectors(np.zeros((0, 32), np.float32), np.zeros(0, np.float32))
    means = []
    for cue_weight in (0.1, 10.0):
        config = HeadConfig(epochs=1, lr=1e-3, batch=16, cue_weight=cue_weight)
        heads = fit_heads(traces, traces, risk, config)
        means.append(np.mean(np.concatenate([each.scores for each in score_traces(heads, traces)])))
    assert means[0] + 0.2 < means[1], means


def test_vectors_survive_packing(tiny: Path) -> None:
    encoder = Detector.load(tiny).encoder
    traces = encode_traces(encoder, [replace(t, source="star1", unsure=frozenset({1})) for t in tiny_traces()[::9]])
    risk = RiskVectors(
        np.stack([each.request for each in traces]), np.array([1.0, 0] * 4 + [1.0], np.float32)[: len(traces)]
    )
    found, asked = unpack(pack(traces, risk))
    assert len(found) == len(traces)
    for before, after in zip(traces, found, strict=True):
        assert after.trace.request == ""
        assert set(after.trace.steps) == {""}
        assert (after.trace.id, after.trace.kind, after.part) == (before.trace.id, before.trace.kind, before.part)
        assert (after.trace.labels, after.trace.unsure) == (before.trace.labels, before.trace.unsure)
        assert after.ends.tolist() == before.ends.tolist()
        step = np.abs(before.steps).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(after.steps - before.steps) <= step / 2 + 1e-7)
    assert asked.harmful.tolist() == risk.harmful.tolist()
    assert set(KINDS) == {"harmful", "alarming", "benign"}


def test_the_artifact_is_whole(tiny: Path) -> None:
    manifest, files = load_files(tiny, "detector")
    assert sorted(files) == [ENCODER_FILE, "first.onnx", GLOSSARY_FILE, "head.onnx", REQUEST_FILE, TOKENIZER_FILE]
    assert manifest.version == version_of("detector", manifest.files)
    assert manifest.files[ENCODER_FILE] == hashlib.sha256((tiny / ENCODER_FILE).read_bytes()).hexdigest()
    assert manifest.metrics["recall_complying_traces"].rate == 1.0
    assert manifest.metrics["flagged_benign_traces"].rate == 0.0
    assert all(value <= manifest.threshold for value in manifest.clear_below)
    assert json.loads((tiny / "manifest.json").read_text())["training"]["how"] == "tiny"


def test_heads_learn_from_an_artifacts_own_vectors(tiny: Path, tmp_path: Path) -> None:
    """Public traces are learned from without their text, and nothing of the encoder changes."""
    corpus = Corpus([replace(trace, source="star1", id=f"p/{trace.id}") for trace in tiny_traces()])
    encoder = Detector.load(tiny).encoder
    packed = pack(
        encode_traces(encoder, corpus.traces), RiskVectors(np.zeros((0, 32), np.float32), np.zeros(0, np.float32))
    )
    material = encode_kept(tiny, Corpus(tiny_traces()[:4]), lambda _: None)
    material = replace(
        material, files=material.files | {REPLAY_FILE: packed}, traces=[*unpack(packed)[0], *material.traces]
    )
    out = tmp_path / "kept"
    finish(material, out, TINY, lambda _: None, {})
    again = encode_kept(out, Corpus(tiny_traces()[:4]), lambda _: None)
    assert [each.trace.id for each in again.traces[:2]] == [corpus.traces[0].id, corpus.traces[1].id]
    assert len(again.traces) == len(corpus.traces) + 4
    assert (out / ENCODER_FILE).read_bytes() == (tiny / ENCODER_FILE).read_bytes()
    scored = score_encoded(Detector.load(out), again.of("test"))
    assert all(each.peak >= Detector.load(out).threshold for each in scored if each.complying)


def test_thresholds_are_chosen_on_what_the_detector_itself_says(tiny: Path, tmp_path: Path) -> None:
    """A harmless trace's loudest clause counts there, which the vectors of its steps do not show."""
    calm = "The weather has been mild this week, and "
    traces = [
        replace(
            trace, kind="alarming", steps=tuple(calm + step for step in trace.steps), labels=("neutral",) * 3
        )
        if part_of_request(trace.request) == "val" and "cue" in trace.labels else trace
        for trace in tiny_traces()
    ]  # fmt: skip
    material = encode_kept(tiny, Corpus(traces), lambda _: None)
    finish(material, tmp_path / "out", TINY, lambda _: None, {})
    built = Detector.load(tmp_path / "out")
    whole = [built.score_vectors(each.request, each.steps, each.previous) for each in material.of("val")]
    built.manifest = built.manifest.model_copy(update={"clear_below": tuple(0.0 for _ in built.manifest.clear_below)})
    scored = score_encoded(built, material.of("val"))
    assert built.threshold == choose_threshold(scored, TINY.allowed)
    assert any((each.scores > alone + 1e-3).any() for each, alone in zip(scored, whole, strict=True))
    apart = [replace(each, scores=alone.astype(float)) for each, alone in zip(scored, whole, strict=True)]
    assert choose_threshold(apart, TINY.allowed) != built.threshold


def test_calibration_leaves_the_order_and_lowers_the_loss(tiny: Path) -> None:
    encoder = Detector.load(tiny).encoder
    traces = encode_traces(encoder, tiny_traces())
    risk = RiskVectors(np.zeros((0, 32), np.float32), np.zeros(0, np.float32))
    train, held = [each for each in traces if each.part == "train"], [each for each in traces if each.part != "train"]
    heads = fit_heads(train, held, risk, TINY.heads)
    steps, previous = (torch.from_numpy(getattr(held[0], name)) for name in ("steps", "previous"))
    request = torch.from_numpy(held[0].request).expand_as(steps)
    with torch.no_grad():
        before = heads(steps, previous, request)[:, 0]
        calibrate(heads, held, risk)
        after = heads(steps, previous, request)[:, 0]
    assert before.argsort().tolist() == after.argsort().tolist()
    assert 0.29 < float(heads.temperature.min()) <= float(heads.temperature.max()) < 5.1


def test_the_first_tier_never_loses_more_than_it_may() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    cue = (rng.random(n) < 0.3).astype(float)
    first = np.clip(0.35 * cue + 0.5 * rng.random(n), 0, 1)
    full = np.clip(0.8 * cue + 0.2 * rng.random(n), 0, 1)
    buckets = rng.integers(0, 3, n).astype(float)
    full[buckets == 0] = 0.1
    false_alarms = (cue == 0) & (buckets > 0) & (rng.random(n) < 0.1)
    full[false_alarms], first[false_alarms] = 0.9, 0.0  # no cues: they must not count
    chosen = choose_clearing(first, full, cue, buckets, 0.7, 3)
    assert chosen[0][0] == HIGHEST
    cleared = (buckets == 0) & (first < HIGHEST)
    assert chosen[0][1] == pytest.approx((cue[cleared].sum() + 1) / (cleared.sum() + 2), abs=1e-6)
    for bucket in (1, 2):
        caught = (cue > 0) & (full >= 0.7) & (buckets == bucket)
        assert 0 < np.mean(first[caught] < chosen[bucket][0]) <= 0.01
    few = np.where(np.arange(n) < ENOUGH - 1, 1.0, 2.0)
    assert len({below for below, _ in choose_clearing(first, full, cue, few, 0.7, 3)}) == 1
    assert max(max(pair) for pair in choose_clearing(first, full, cue, buckets, 0.2, 3)) <= 0.2


def test_a_model_that_disagrees_is_refused() -> None:
    assert compare_scores(np.array([0.5]), np.array([0.5]), 1e-4) == 0
    with pytest.raises(UserError, match=r"difference of 0\.1"):
        compare_scores(np.array([0.0]), np.array([0.1]), 1e-4)
    with pytest.raises(UserError, match="difference of nan"):
        compare_scores(np.array([np.nan]), np.array([0.1]), 1e-4)


def test_a_foreign_encoder_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the pretrained encoder"):
        base_directory(tiny_base)
    with pytest.raises(UserError, match="is not here"):
        base_directory(tmp_path)


def test_heads_come_back_from_their_file() -> None:
    torch.manual_seed(1)
    heads = Heads(8).eval()
    again = read_heads(export_heads(heads))
    rows = [torch.randn(3, 8) for _ in range(3)]
    with torch.no_grad():
        assert torch.equal(again(*rows), heads(*rows))


def test_heads_read_all_they_are_given() -> None:
    torch.manual_seed(0)
    heads = Heads(8).eval()
    step, previous, request = (torch.randn(1, 8) for _ in range(3))
    score = heads(step, previous, request)[0, 0]
    for changed in ((-step, previous, request), (step, -previous, request), (step, previous, -request)):
        assert heads(*changed)[0, 0] != score
    assert heads(step, previous, request)[0, 1] == heads(-step, -previous, request)[0, 1]
