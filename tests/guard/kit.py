"""Small real tokenizers and runtimes whose every id is known, and a driver that plays the engine."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from classifiers.detector import Asked, Detector, RequestContext
from guard.monitor import StepMonitor
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.steps import Zone
from guard.triggers import NEUTRAL, POOL, REFUSAL, STOPPING

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CUE = "I will agree to help with it."
CALM = "The user asks about a car."
TEXTS = (CUE, CALM, "My reply ends here.", NEUTRAL.text, STOPPING, REFUSAL, *(t.text for t in POOL))
_WORD = r" ?\w+|[^\w\s]+|\s"


def byte_level(texts: Iterable[str] = TEXTS, special: Iterable[str] = SPECIAL, added: Iterable[str] = ()) -> Tokenizer:
    """Ids: special tokens, then added ones, the 256 bytes, one token per word and mark of `texts`."""
    special, added = tuple(special), tuple(added)
    vocab = {token: i for i, token in enumerate([*special, *added, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in texts:
        for word in re.findall(_WORD, text) + re.findall(_WORD, " " + text):
            vocab.setdefault(spell.pre_tokenize_str(word)[0][0], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORD), "isolated"), spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return tokenizer


def metaspace(texts: Iterable[str] = TEXTS) -> Tokenizer:
    """Ids: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes <0x00> to <0xFF>, then `▁` and the words of `texts`."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"])}
    for text in texts:
        for word in re.findall(r"\w+|[^\w\s]", text):
            for token in (word, "▁" + word):
                vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace("\u2581", "_")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first", split=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary holds."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


@functools.cache
def tokenizer() -> Tokenizer:
    """The byte-level tokenizer with `<think>` (3) and `</think>` (4)."""
    return byte_level()


class WordDetector(Detector):
    """A detector without a model: 0.875 for steps that agree, 0.125 for all others."""

    def __init__(self) -> None:
        self.version = "words-1"
        self.threshold = 0.5

    def request(self, *messages: str) -> RequestContext:
        return RequestContext(np.zeros(1, np.float32), 0.5, 0)

    def score_batch(self, asked: Sequence[Asked], *, first_tier: bool = True) -> npt.NDArray[np.float32]:
        return np.array([score(each.step) for each in asked], np.float32)


@functools.cache
def runtime(policy: Policy | None = None) -> GuardRuntime:
    """A real runtime over `tokenizer()`; scores come from `WordDetector` or from whoever drives the monitor."""
    return GuardRuntime.build(
        policy or Policy(), WordDetector(), tokenizer(), "kit", token_id(tokenizer(), "<|im_end|>")
    )


def encode(text: str) -> list[int]:
    """Ids of a text; `<think>` and `</think>` in it become special."""
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def spelled(text: str) -> list[int]:
    """One token per byte: what no special token can come from."""
    table = runtime().table
    ids = {piece: i for i, piece in reversed(list(enumerate(table.bytes_of))) if len(piece) == 1}
    return [ids[bytes([b])] for b in text.encode()]


def monitor(policy: Policy | None = None, *, zone: Zone = "reasoning", request: str = "car") -> StepMonitor:
    """A fresh monitor; the default threshold is 0.5."""
    return StepMonitor(runtime(policy), request, zones=runtime(policy).zones(zone), guard_id="kit")


def score(text: str) -> float:
    """A pure score: 0.875 for steps that agree, 0.125 for all others."""
    return 0.875 if "agree" in text else 0.125


def replay(watcher: StepMonitor, output: Iterable[int], scorer: Callable[[str], float | None] = score) -> StepMonitor:
    """Feeds recorded output ids and ends the request."""
    for token in output:
        watcher.observe(token)
        if watcher.pending is not None:
            watcher.decide(scorer(watcher.pending.text))
    watcher.finish()
    if watcher.pending is not None:
        watcher.decide(scorer(watcher.pending.text))
    return watcher


def generate(
    watcher: StepMonitor,
    model: Iterable[int],
    scorer: Callable[[str], float | None] = score,
    obey: Callable[[int], bool] = lambda index: True,
) -> list[int]:
    """Plays an engine whose model says `model`: forced ids come first where `obey`; returns the output ids.

    A plan that still runs when the model has nothing more to say is carried out.
    """  # fmt: skip
    output: list[int] = []

    def append(token: int) -> None:
        output.append(token)
        watcher.observe(token)
        if watcher.pending is not None:
            watcher.decide(scorer(watcher.pending.text))

    for token in model:
        while watcher.forced is not None and obey(len(output)):
            append(watcher.forced)
        append(token)
    while watcher.forced is not None:
        append(watcher.forced)
    watcher.finish()
    if watcher.pending is not None:
        watcher.decide(scorer(watcher.pending.text))
    return output
