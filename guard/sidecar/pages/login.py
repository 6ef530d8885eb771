"""Logging in: sessions that end, tokens that only our own forms carry, and a limit on wrong tries."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from guard.sidecar.pages.reviewers import Reviewers

COOKIE = "reasonguard_session"
SESSION_SECONDS = 8 * 3600
WINDOW = 300.0
"""Seconds in which tries are counted."""
TRIES = 10
"""Wrong passwords within the window, for one name or from one address."""
ALL_TRIES = 100
"""The same of everybody together: each costs a core 50 ms."""
_MOST_KEYS = 1000


class Sessions:
    """Starlette's signed cookie, `Secure` where the request came over TLS. The key lives as long as the process."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        key = secrets.token_urlsafe(32)
        self._plain, self._tls = (
            SessionMiddleware(
                app, key, session_cookie=COOKIE, max_age=SESSION_SECONDS, path=path, same_site="strict", https_only=tls
            )
            for tls in (False, True)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its session."""
        await (self._tls if scope.get("scheme") == "https" else self._plain)(scope, receive, send)


@dataclass(frozen=True)
class _Session:
    name: str
    hash: str | None
    """Of the password that began it: a new password, or none any more, ends it."""
    ends: float


@dataclass
class Logins:
    """Who is logged in. A cookie names a session, and what the session allows is known here alone: so a log-out ends
    it for every copy of the cookie."""

    reviewers: Reviewers
    now: Callable[[], float] = time.monotonic
    _open: dict[str, _Session] = field(default_factory=dict)
    _tries: dict[str, deque[float]] = field(default_factory=dict)

    def who(self, connection: HTTPConnection) -> str | None:
        """The reviewer who is logged in; None: nobody, or nobody any more."""
        session = self._open.get(str(connection.session.get("sid")))
        if session is None or session.ends <= self.now() or self.reviewers.hash_of(session.name) != session.hash:
            return None
        return session.name

    def begin(self, connection: HTTPConnection, name: str) -> None:
        """A new session under a new id and a new token."""
        now = self.now()
        self._open = {sid: each for sid, each in self._open.items() if each.ends > now}
        sid = secrets.token_urlsafe(32)
        self._open[sid] = _Session(name, self.reviewers.hash_of(name), now + SESSION_SECONDS)
        connection.session.clear()
        connection.session.update(sid=sid, csrf=secrets.token_urlsafe(32))

    def end(self, connection: HTTPConnection) -> None:
        """Ends the session."""
        self._open.pop(str(connection.session.get("sid")), None)
        connection.session.clear()

    def allowed(self, name: str, address: str) -> bool:
        """Whether one more try may be made; it counts as wrong until `forgive` is called."""
        if len(self._tries) > _MOST_KEYS:
            self._tries = {
                key: times for key, times in self._tries.items() if times and times[-1] > self.now() - WINDOW
            }
        limits = {f"name {name[:64]}": TRIES, f"address {address}": TRIES, "all": ALL_TRIES}
        held = {key: self._recent(key) for key in limits}
        if any(len(times) >= limits[key] for key, times in held.items()):
            return False
        for times in held.values():
            times.append(self.now())
        return True

    def forgive(self, name: str, address: str) -> None:
        """Takes the last try back: its password was right."""
        for key in (f"name {name[:64]}", f"address {address}", "all"):
            if self._tries.get(key):
                self._tries[key].pop()

    def _recent(self, key: str) -> deque[float]:
        times = self._tries.setdefault(key, deque())
        while times and times[0] <= self.now() - WINDOW:
            times.popleft()
        return times


def token(connection: HTTPConnection) -> str:
    """The session's token, which every form of ours carries."""
    found = connection.session.get("csrf")
    if not isinstance(found, str):
        found = connection.session["csrf"] = secrets.token_urlsafe(32)
    return found


def is_ours(connection: HTTPConnection, given: str) -> bool:
    """Whether a form carries its session's token."""
    wanted = connection.session.get("csrf")
    return isinstance(wanted, str) and hmac.compare_digest(wanted.encode(), given.encode("utf-8", "replace"))
