"""What every judge offers, and how one is named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from classifiers.judge import Judge, Judgement
from guard.errors import UserError

REMOTE = "openai:"


class Judging(Protocol):
    """Says of finished outputs whether they are harmful; never the detector that intervened."""

    version: str

    def judge(self, rows: Sequence[tuple[str, str, str]]) -> Sequence[Judgement | None]:
        """Return a judgement for each (request, reasoning, answer); None where the judge gave no verdict."""
        ...


def open_judge(spec: str | None, cache: Path) -> Judging:
    """The built-in judge (None), one in a directory, or `openai:URL,MODEL`.

    A remote judge keeps its verdicts in `cache`, so that one that is down loses nothing. Errors: `check_spec`, and
    `Judge.load`'s.
    """
    remote = check_spec(spec)
    if remote is None:
        return Judge.load(None if spec is None else Path(spec))
    from classifiers.openai_judge import OpenAIJudge

    return OpenAIJudge(*remote, cache)


def check_spec(spec: str | None) -> tuple[str, str] | None:
    """(URL, model) of a remote judge's spec, None for another; a malformed one is a UserError."""
    if spec is None or not spec.startswith(REMOTE):
        return None
    url, _, model = spec.removeprefix(REMOTE).partition(",")
    if not url.startswith(("http://", "https://")) or not model.strip():
        raise UserError("--judge", got=spec, wanted="openai:URL,MODEL such as openai:http://localhost:8000/v1,my-model")
    return url, model.strip()
