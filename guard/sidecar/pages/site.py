"""What the pages share: the store, the templates, and a pool of threads, so that no page holds up a guarded request."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import QueryParams
from starlette.responses import HTMLResponse, RedirectResponse, Response

from guard.errors import UserError
from guard.runtime import tokenizer_hash
from guard.sidecar.context import Sidecar
from guard.sidecar.pages.text import plain, visible
from guard.store.store import Store, reason
from guard.weights import BASE, Registry

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROOT = "/guard"
"""Where the pages lie."""
_THREADS = 2
_CELL = 2000


@dataclass(frozen=True)
class Asked:
    """One request of a reviewer who is logged in."""

    reviewer: str
    csrf: str
    query: QueryParams
    path: dict[str, str]
    form: dict[str, str]


@dataclass(frozen=True)
class NotFound(Exception):
    """There is no such thing in the store."""

    what: str


View = Callable[["Site", Asked], Response]


@dataclass
class Site:
    """One sidecar's pages."""

    sidecar: Sidecar
    store_url: str
    tokenizer: Tokenizer
    registry: Registry | None = None
    now: Callable[[], float] = time.time
    _store: Store | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_THREADS, "review-pages"))

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """Of the served model: traces with another one cannot be read."""
        return tokenizer_hash(self.tokenizer)

    @property
    def store(self) -> Store:
        """The store that the spool feeds, opened on first use: whoever feeds it makes its tables."""
        with self._opening:
            if self._store is None:
                self._store = Store.open(self.store_url)
            return self._store

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        known = [i for i in ids if 0 <= i < 2**32]
        return str(self.tokenizer.decode(known, skip_special_tokens=False))

    def version_names(self) -> Callable[[str], str]:
        """Tells the version from the hash of its weights; what is none of the registry's keeps its hash."""
        found: dict[str, str] = {}
        if self.registry is not None:
            for manifest in map(self.registry.manifest, self.registry.versions()):
                found |= {manifest.base: f"{BASE} (as it came)", manifest.weights: str(manifest.version)}
        return lambda weights: found.get(weights, weights or "unknown")

    async def run(self, view: View, asked: Asked) -> Response:
        """A view in a thread of the pool; what is missing or broken becomes a page that says so."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._answer, view, asked)

    def _answer(self, view: View, asked: Asked) -> Response:
        try:
            return view(self, asked)
        except NotFound as error:
            return render("error.html.j2", asked, 404, title="Not found", message=error.what)
        except (SQLAlchemyError, UserError) as error:
            said = reason(error) if isinstance(error, SQLAlchemyError) else str(error)
            return render("error.html.j2", asked, 503, title="This page cannot be shown", message=said)

    def close(self) -> None:
        """Ends the threads and the connections."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()


def render(template: str, asked: Asked | None, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. Every string in it is shown as text: escaped, bounded, with nothing hidden."""
    page = _environment().get_template(template)
    return HTMLResponse(page.render(root=ROOT, asked=asked, **values), status)


def to(path: str) -> RedirectResponse:
    """Sends the browser to another page, as a GET."""
    return RedirectResponse(ROOT + path, 303)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("guard.sidecar.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: plain(value, _CELL) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"visible": visible, "plain": plain, "when": _when}
    return environment


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))
