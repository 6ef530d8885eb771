"""What continues token ids: this machine's engine (`align.generate`), or endpoints (`align.endpoints`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from align.generate import Job, Result


class Backend(Protocol):
    """Continues prompts in batches, file to file."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its continuation may have together."""

    def generate(self, jobs: Sequence[Job], out: Path, what: str) -> dict[str, Result]:
        """Results of all jobs by id, generating only those that the JSON lines of `out` do not hold yet.

        `what` names the work to whoever waits. UserError when it cannot be done; what is whole by then is in `out`.
        """
