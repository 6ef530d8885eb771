"""Traces to review, and the pages over a real store, served over HTTP."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import httpx

from guard.runtime import tokenizer_hash
from guard.sidecar.app import create_app
from guard.sidecar.context import Sidecar, build_sidecar
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.pages.app import create_pages
from guard.sidecar.pages.login import Logins
from guard.sidecar.pages.reviewers import Reviewers
from guard.sidecar.pages.site import Site
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.upstream import Upstream
from guard.store.ingest import Ingester
from guard.store.store import Store
from guard.traces import Intervention, Receipt, Spool, StepRecord, Trace
from guard.weights import Registry
from tests.guard import kit
from tests.guard.sidecar.conftest import running

PASSWORD = "correct horse battery"
NOW = 1_795_000_000.0
#: What a hostile model might say.
SCRIPT = "<script>document.title='owned'</script><img src=x onerror=alert(1)> {{7*7}} ${7*7} \u202eevil\u202c \0 end"
TRIGGER = "Wait, going along with this could do real harm to somebody."


@dataclass(frozen=True)
class Said:
    """One step to record: its text, its score, whether it was a cue, whether it is a trigger."""

    text: str
    score: float | None = 0.1
    cue: bool = False
    injected: bool = False
    replaced: str = ""
    """The cue whose place this trigger took."""


def told(guard_id: str, request: str, steps: Sequence[Said], *, answer: str = "", **changes: Any) -> Trace:
    """A trace whose output is these steps and an answer that nobody watched."""
    ids: list[int] = []
    records, done = [], []
    for number, step in enumerate(steps):
        own = kit.encode(("" if number == 0 else " ") + step.text)
        start = len(ids)
        ids += own
        records.append(
            StepRecord(start, len(ids), "reasoning", None if step.injected else step.score, step.cue, step.injected)
        )
        if step.injected:
            at = {"step": number, "mode": "substitute", "cue_ids": kit.encode(" " + step.replaced)}
            at = at if step.replaced else {"step": number - 1, "mode": "inject"}
            done.append(
                Intervention(at=start, trigger_id="wait-harm", score=step.score, forced=len(own), completed=True, **at)
            )
    ids += kit.encode("</think>" + answer) if answer else []
    unscored = sum(step.score is None and not step.injected for step in steps)
    receipt = Receipt(
        guard_id=guard_id, policy="default", policy_hash="2acf9ffb68ef", detector="default-3f0c", engine="vllm-v1",
        seen=len(steps), scored=len(steps) - unscored, unscored=unscored, interventions=done,
        injected_tokens=sum(i.forced for i in done),
    )  # fmt: skip
    trace = Trace(
        guard_id=guard_id, created=NOW - 60, model="kit", weights="w0", tokenizer_hash=tokenizer_hash(kit.tokenizer()),
        request=request, prompt_ids=kit.encode(request), output_ids=ids, steps=records, receipt=receipt,
    )  # fmt: skip
    return trace.model_copy(update=changes)


LAMP = told("lamp", "How do I steal a lamp?", [
    Said("The user asks about a lamp.", 0.02),
    Said("It is wrong, but I will agree to plan it.", 0.93, cue=True),
    Said(TRIGGER, 0.93, injected=True),
    Said("They may have a reason, so I can go on.", 0.31),
], answer="I cannot help with that.")  # fmt: skip
CAKE = told("cake", "How do I bake a cake?", [
    Said("The user asks for a recipe.", 0.01), Said("First I need flour and sugar.", 0.44),
], answer="Mix them and bake.")  # fmt: skip
SHED = told("shed", "How do I burn down a shed?", [
    Said("The user asks about a shed.", 0.05),
    Said(TRIGGER, 0.88, injected=True, replaced="I agree, they surely have a good reason."),
    Said("I will say no.", 0.2),
])  # fmt: skip


@dataclass
class Pages:
    """The pages, the store they show, and a browser's cookies."""

    store: Store
    sidecar: Sidecar
    site: Site
    reviewers: Reviewers
    logins: Logins
    http: httpx.Client
    spool: Path

    def feed(self, *traces: Trace) -> None:
        """Stores traces as `serve` does: through the spool."""
        for trace in traces:
            Spool(self.spool).append(trace)
        Ingester(self.store, self.spool).run()

    def get(self, path: str, status: int = 200) -> str:
        """A page's HTML."""
        response = self.http.get(f"/guard{path}")
        assert response.status_code == status, response.text
        return response.text

    def token(self, path: str = "/review") -> str:
        """The token that the forms of a page carry."""
        found = re.search(r'name="csrf" value="([^"]+)"', self.get(path))
        assert found
        return unescape(found[1])

    def post(self, path: str, **fields: str) -> httpx.Response:
        """Sends a form of ours."""
        return self.http.post(f"/guard{path}", data={"csrf": self.token(), **fields})

    def log_in(self, name: str = "ann", password: str = PASSWORD) -> httpx.Response:
        """Sends the log-in form."""
        fields = {"csrf": self.token("/login"), "name": name, "password": password, "next": "/review"}
        return self.http.post("/guard/login", data=fields)


@contextlib.contextmanager
def opened(directory: Path, *, url: str | None = None, registry: Registry | None = None) -> Iterator[Pages]:
    """Pages over an empty store, nobody logged in; `ann` and `bob` may."""
    spool = directory / "spool"
    spool.mkdir()
    store = Store.open(url or f"sqlite:///{directory}/store.db", migrate=True)
    sidecar = build_sidecar(
        kit.runtime(), Neutraliser(kit.tokenizer()), Upstream("http://127.0.0.1:9", "key"), SpoolFollower(spool),
        secret="s", alive=lambda: True, spool=Spool(spool), served_name="kit", allow_seed=True,
    )  # fmt: skip
    sidecar.probe.proven = True
    reviewers = Reviewers(directory / "reviewers.json")
    for name in ("ann", "bob"):
        reviewers.add(name, PASSWORD)
    site = Site(sidecar, str(store.engine.url.render_as_string(False)), kit.tokenizer(), registry, now=lambda: NOW)
    logins = Logins(reviewers)
    pages = create_pages(site, reviewers, logins)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(running(create_app(sidecar, pages=pages)))
        http = stack.enter_context(httpx.Client(base_url=address, trust_env=False, timeout=60))
        yield Pages(store, sidecar, site, reviewers, logins, http, spool)
    site.close()
    store.close()


def text_of(html: str) -> str:
    """What a page says, tags left out."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())
