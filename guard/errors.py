"""Errors meant for the person who runs Reasonguard.

A `UserError` is a condition the user can mend: a damaged artifact, a malformed policy, a port in use. The command
line prints it as one sentence and exits with code 2. Everything else that goes wrong inside the guard while a request
runs is *data*: it is recorded on the receipt and answered by the policy's fail mode (see `guard.monitor`).
"""

from __future__ import annotations


class UserError(Exception):
    """A condition the user can mend, told as what, got, wanted, how to fix."""

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, wanted: str | None = None, fix: str | None = None) -> None:
        self.what, self.got, self.wanted, self.fix = what, got, wanted, fix
        parts = [what.rstrip(".")]
        if got is not None:
            parts.append(f"got {_short(got)}")
        if wanted is not None:
            parts.append(f"wanted {wanted.rstrip('.')}")
        sentence = "; ".join(parts) + "."
        super().__init__(f"{sentence} {fix.rstrip('.')}." if fix else sentence)


def _short(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
