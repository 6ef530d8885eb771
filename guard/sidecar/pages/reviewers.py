"""Who may open the review pages: a file of names and scrypt hashes, read again whenever it changes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import secrets
from pathlib import Path

from guard.errors import UserError

MIN_PASSWORD = 10
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
#: 16 MiB and some 50 ms a try: what OWASP asks for (N = 2^17 would be 128 MiB) less memory, behind a limit on tries.
_N, _R, _P = 2**14, 8, 1
_HASH = re.compile(r"scrypt\$([A-Za-z0-9+/=]{24})\$([A-Za-z0-9+/=]{44})")
_NOBODY = "scrypt$" + base64.b64encode(bytes(16)).decode() + "$" + base64.b64encode(bytes(32)).decode()


def hash_password(password: str) -> str:
    """A password as it is kept: `scrypt$SALT$HASH`."""
    salt = secrets.token_bytes(16)
    return f"scrypt${base64.b64encode(salt).decode()}${base64.b64encode(_scrypt(password, salt)).decode()}"


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=_N, r=_R, p=_P, dklen=32)


class Reviewers:
    """The file. Its owner alone can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, int], dict[str, str]] | None = None

    def hashes(self) -> dict[str, str]:
        """Password hashes by name; UserError when the file is missing or damaged."""
        try:
            about = self.path.stat()
            stamp = (about.st_mtime_ns, about.st_size)
            if self._read is None or self._read[0] != stamp:
                self._read = (stamp, self._parse(self.path.read_bytes()))
        except FileNotFoundError as error:
            raise UserError(
                f"Reviewers' file {self.path} does not exist", fix="`reviewers add NAME` makes it"
            ) from error
        except OSError as error:
            raise UserError(f"Reviewers' file {self.path} cannot be read", got=error.strerror) from error
        return self._read[1]

    def hash_of(self, name: str) -> str | None:
        """A reviewer's password hash; None for a name that nobody has, and for all while the file cannot be read."""
        try:
            return self.hashes().get(name)
        except UserError:
            return None

    def verify(self, name: str, password: str) -> bool:
        """Whether it is that reviewer's password; it takes the same time for a name that nobody has."""
        kept = self.hash_of(name) or _NOBODY
        found = _HASH.fullmatch(kept)
        assert found is not None
        salt, wanted = (base64.b64decode(part) for part in found.groups())
        return hmac.compare_digest(_scrypt(password, salt), wanted) and kept != _NOBODY

    def add(self, name: str, password: str) -> bool:
        """Adds a reviewer or sets a new password; True for a new one. UserError for a bad name or a short password."""
        if not _NAME.fullmatch(name):
            raise UserError("A reviewer's name", got=name, wanted="1 to 64 of the characters a-z A-Z 0-9 . _ @ -")
        if len(password) < MIN_PASSWORD:
            raise UserError("The password is too short", wanted=f"at least {MIN_PASSWORD} characters")
        known = dict(self.hashes()) if self.path.exists() else {}
        new = name not in known
        self._write({**known, name: hash_password(password)})
        return new

    def remove(self, name: str) -> None:
        """Takes a reviewer out: their next click asks for a login. UserError when there is none of that name."""
        known = dict(self.hashes())
        if known.pop(name, None) is None:
            raise UserError(f"{self.path} has no reviewer {name}", wanted=", ".join(sorted(known)) or "nobody is left")
        self._write(known)

    def _parse(self, content: bytes) -> dict[str, str]:
        try:
            known = json.loads(content)
            whole = isinstance(known, dict) and all(
                _NAME.fullmatch(name) and _HASH.fullmatch(kept) and base64.b64decode(kept.split("$")[2], validate=True)
                for name, kept in known.items()
            )
        except (ValueError, TypeError, RecursionError, binascii.Error):
            whole = False
        if not whole:
            raise UserError(f"Reviewers' file {self.path} is damaged", wanted='{"NAME": "scrypt$SALT$HASH", ...}')
        return dict(known)

    def _write(self, known: dict[str, str]) -> None:
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(known, file, indent=1, sort_keys=True)
            scratch.replace(self.path)
        except OSError as error:
            raise UserError(f"Reviewers' file {self.path} cannot be written", got=error.strerror) from error
        finally:
            scratch.unlink(missing_ok=True)
