"""What rolling out needs beside its input, on this machine or on a Ray worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from align.backend import Backend
from align.model import render
from align.pairs import Provenance
from align.seam import SeamCheck
from align.sources import Source
from align.text import ReplyReader
from classifiers.judge import Judge
from guard.runtime import GuardRuntime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tools:
    """Detector, triggers and step rules (`runtime`), judge, and what continues token ids (`backend`)."""

    runtime: GuardRuntime
    judge: Judge
    backend: Backend
    seam: SeamCheck
    render: Callable[[str], list[int]]
    """A request as the model's chat template renders it."""

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, runtime: GuardRuntime, judge: Judge, backend: Backend) -> Tools:
        """The rest is read from the tokenizer."""
        seam = SeamCheck(runtime.table, tokenizer.bos_token_id, tokenizer.eos_token_id)
        return cls(runtime, judge, backend, seam, partial(render, tokenizer))

    @property
    def reader(self) -> ReplyReader:
        """Output ids -> reasoning and answer."""
        return ReplyReader(self.runtime.table, self.runtime.grammar)

    def provenance(self, source: Source, settings_hash: str) -> Provenance:
        """What a pair of this source came about by."""
        return Provenance(
            origin=source.origin, model=self.runtime.model, tokenizer_hash=self.runtime.tokenizer_hash,
            policy_hash=source.policy_hash, detector=source.detector, judge=self.judge.version,
            settings_hash=settings_hash,
        )  # fmt: skip
