"""Takes changed files over without a restart: by SIGHUP, or by `POST /guard/admin/reload` with the operator's token.

The engine keeps no rules: every request names its own, and before engines at `--upstream` the sidecar applies them
itself. So a reload is a matter of the sidecar alone, and requests under way end under the rules they began with. New
rules are proven in the engine (or in each of several) before anyone is served under them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from guard.errors import UserError
from guard.sidecar.errors import ApiError
from guard.sidecar.rules import Rules, RulesReader

if TYPE_CHECKING:
    from guard.sidecar.context import Sidecar

RELOAD = "/guard/admin/reload"
TOKEN_VARIABLE = "REASONGUARD_ADMIN_TOKEN"
MIN_TOKEN = 16
_POLL = 0.25
log = logging.getLogger(__name__)


class Reloader:
    """Reads the rules again when asked; what is wrong changes nothing, and is said."""

    def __init__(self, sidecar: Sidecar, reader: RulesReader, token: str | None = None) -> None:
        self._sidecar, self._reader, self.token = sidecar, reader, token
        self._lock = asyncio.Lock()
        self._asked = False
        self.problem: str | None = None
        """Why the files as they were read last are not in force; None: they are."""

    def soon(self) -> None:
        """Asks for a reload; may be called by a signal handler."""
        self._asked = True

    async def run(self) -> None:
        """Attends to `soon` until cancelled."""
        while True:
            # A starting engine proves nothing yet.
            if self._asked and self._sidecar.probe.proven:
                self._asked = False
                await self.reload()
            await asyncio.sleep(_POLL)

    async def reload(self) -> dict[str, Any]:
        """Takes the files over, or leaves everything as it is; returns what is in force, and the problem if any."""
        async with self._lock:
            try:
                rules = await asyncio.to_thread(self._reader.read)
                self.problem = await self._proven(rules)
            except (UserError, OSError) as error:
                self.problem = str(error)
            except ApiError as error:
                self.problem = error.message
            except Exception as error:  # noqa: BLE001 - what serves must go on
                self.problem = f"{type(error).__name__}: {error}"
            if self.problem is None:
                self._sidecar.adopt(rules)
            else:
                log.error("reload refused, what was in force stays: %s", self.problem)
            metrics = self._sidecar.metrics
            metrics.reloads.labels("loaded" if self.problem is None else "refused").inc()
            metrics.reload_ok.set(self.problem is None)
            return {"reloaded": self.problem is None, "problem": self.problem, **self._in_force()}

    async def _proven(self, rules: Rules) -> str | None:
        """Has a trigger really take effect under each policy that is new, with the detector that comes with it."""
        known = {(tenant.policy.hash, tenant.detector) for tenant in self._sidecar.rules.distinct}
        new = [tenant for tenant in rules.distinct if (tenant.policy.hash, tenant.detector) not in known]
        problems = await asyncio.gather(*(self._sidecar.probe.try_out(tenant) for tenant in new))
        return next(
            (f"policy {tenant.policy.name} {tenant.policy.hash} was not proven: {problem}"
             for tenant, problem in zip(new, problems, strict=True) if problem is not None), None,
        )  # fmt: skip

    def _in_force(self) -> dict[str, Any]:
        runtime, keys, canary = self._sidecar.runtime, self._sidecar.keys, self._sidecar.comparer.canary
        return {
            "policy": runtime.policy.name, "policy_hash": runtime.policy.hash, "detector": runtime.detector.version,
            "keys": None if keys is None else {t.name: t.policy.hash for t in keys.values()},
            "canary": canary and canary.fingerprint,
        }  # fmt: skip


async def reload(request: Request) -> Response:
    """200 with what is in force now; 409 with the problem; 401 without the token, 404 where `serve` has none."""
    reloader: Reloader | None = request.app.state.sidecar.reloader
    if reloader is None or reloader.token is None:
        raise ApiError(404, "not_found", f"There is no admin token: see --admin-token-file and {TOKEN_VARIABLE}.")
    given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, f"Bearer {reloader.token}".encode()):
        raise ApiError(401, "invalid_admin_token", "This route takes the operator's token.")
    answer = await reloader.reload()
    return JSONResponse(answer, 200 if answer["reloaded"] else 409)


def admin_token(file: Path | None) -> str | None:
    """The token from a file, or from the environment; None: the route is closed."""
    token = os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        try:
            token = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Admin token file {file} cannot be read", got=str(error)) from error
    if token is None:
        return None
    if len(token.strip()) < MIN_TOKEN:
        source = file or TOKEN_VARIABLE
        raise UserError(f"The admin token in {source} is too short", wanted=f"at least {MIN_TOKEN} characters")
    return token.strip()
