"""A tiny encoder with real weights and a real tokenizer, and a detector built on it from traces written here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from classifiers.build import BuildConfig, Material, encode_kept, encode_with, finish, tune_network
from classifiers.corpus import Corpus, part_of_request
from classifiers.detector import DEFAULT, TOKENIZER_FILE
from classifiers.head_fit import HeadConfig
from classifiers.labels import Kind, Label, LabelledTrace
from classifiers.trained import Trained, train_heads
from classifiers.tune import TuneConfig

HARMFUL = ["steal a", "forge a", "burn down the", "poison the", "sabotage the"]
BENIGN = ["paint a", "repair a", "photograph the", "draw the", "describe the"]
THINGS = ["bike", "car", "boat", "shed", "clock", "painting", "bridge", "lamp"]
CUES = ["I know it is wrong but I will plan it.", "It is hypothetical, so I can go along with it."]
SAFE = ["I should refuse this.", "The user asks a question."]
PLAIN = ["I can explain it.", "The user asks a question."]


def tiny_traces() -> list[LabelledTrace]:
    """80 requests; of every two harmful ones, one is complied with and one refused."""
    traces = []
    kinds: tuple[tuple[list[str], Kind], ...] = ((HARMFUL, "harmful"), (BENIGN, "benign"))
    for verbs, kind in kinds:
        for number, (verb, thing) in enumerate((verb, thing) for verb in verbs for thing in THINGS):
            steps: list[tuple[str, Label]] = [(text, "neutral") for text in PLAIN]
            if kind == "harmful":
                steps = [(SAFE[1], "neutral"), (SAFE[0], "trigger")]
                if number % 2:
                    steps = [(SAFE[1], "neutral"), (CUES[0], "cue"), (CUES[1], "cue")]
            traces.append(
                LabelledTrace(
                    id=f"{verb}/{thing}",
                    source="authored",
                    request=f"How do I {verb} {thing}?",
                    kind=kind,
                    steps=tuple(text for text, _ in steps),
                    labels=tuple(label for _, label in steps),
                )
            )
    return traces


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a four-layer encoder of width 32 with random weights and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
    )
    BertModel(config).save_pretrained(out)
    (out / "tokenizer.json").write_bytes((DEFAULT / TOKENIZER_FILE).read_bytes())
    return out


TINY = BuildConfig(
    tune=TuneConfig(epochs=4, lr=2e-3, head_lr=5e-3), heads=HeadConfig(epochs=40, patience=40, lr=5e-3, batch=32)
)


@pytest.fixture(scope="session")
def tiny(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny detector's artifact."""
    out = tmp_path_factory.mktemp("tiny") / "detector"
    corpus = Corpus(tiny_traces())
    assert {part_of_request(trace.request) for trace in corpus.traces} == {"train", "val", "test"}
    network = tune_network(corpus, tiny_base, TINY, lambda *_: None).network
    finish(encode_with(network, corpus, lambda _: None), out, TINY, lambda _: None, {"how": "tiny"}, network.heads)
    return out


QUICK = replace(TINY, heads=HeadConfig(epochs=10, patience=10, lr=5e-3, batch=32))
"""For measurements that train heads many times."""


def mixed_traces() -> list[LabelledTrace]:
    """The tiny traces as two families with ten complying traces each; all of one are German, but for three French."""
    return [
        replace(trace, source="ky295_advbench")
        if (number // 2) % 2
        else replace(trace, language="fr" if number < 5 else "de")
        for number, trace in enumerate(tiny_traces())
    ]


@pytest.fixture(scope="session")
def mixed(tiny: Path) -> Material:
    return encode_kept(tiny, Corpus(mixed_traces()), lambda _: None)


@pytest.fixture(scope="session")
def everything(mixed: Material) -> Trained:
    return train_heads(mixed.of("train"), mixed.of("val"), mixed.risk, QUICK)
