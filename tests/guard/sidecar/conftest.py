"""Parts that the sidecar's tests share: the tiny tokenizer's runtime, and real HTTP servers on free ports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from classifiers.detector import Detector
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.sidecar.neutral import Neutraliser
from tests.guard.sidecar.fronts import RemoteFront, remote_fronts
from tests.guard.sidecar.serving import running

__all__ = ["running"]

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    """The tiny model's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture(scope="session")
def neutraliser(tokenizer: Tokenizer) -> Neutraliser:
    """Knows the tiny tokenizer's five special tokens."""
    return Neutraliser(tokenizer)


@pytest.fixture(scope="session")
def runtime(tokenizer: Tokenizer) -> GuardRuntime:
    """The default policy and the packaged detector on the tiny tokenizer."""
    return GuardRuntime.build(Policy(), Detector.load(), tokenizer, "tiny")


@pytest.fixture
def remotes(
    runtime: GuardRuntime, neutraliser: Neutraliser, tokenizer: Tokenizer, tmp_path: Path
) -> Iterator[Callable[..., RemoteFront]]:
    """Starts sidecars before scripted engines that run already."""
    with remote_fronts(runtime, neutraliser, tokenizer, tmp_path) as begin:
        yield begin
