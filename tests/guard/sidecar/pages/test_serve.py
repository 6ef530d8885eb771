"""`serve --reviewers`: the same pages, on the model, the store and the registry that are served."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import httpx
import pytest

from guard.errors import UserError
from guard.runtime import tokenizer_hash
from guard.sidecar.app import create_app
from guard.sidecar.pages.reviewers import Reviewers
from guard.sidecar.serve import ServeSettings, prepare
from guard.traces import Spool
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.pages.kit import LAMP, PASSWORD


def test_serve_has_the_pages_for_its_reviewers(tiny_model: Path, tmp_path: Path) -> None:
    file, traces = tmp_path / "reviewers.json", tmp_path / "traces"
    with pytest.raises(UserError, match=r"reviewers.json does not exist. `reviewers add NAME` makes it"):
        prepare(ServeSettings(str(tiny_model), traces, reviewers=file))
    assert prepare(ServeSettings(str(tiny_model), traces)).pages is None
    Reviewers(file).add("ann", PASSWORD)
    parts = prepare(ServeSettings(str(tiny_model), traces, reviewers=file))
    assert parts.pages is not None
    ids = parts.model.tokenizer.encode("Hello", add_special_tokens=False).ids
    hash = tokenizer_hash(parts.model.tokenizer)
    trace = LAMP.model_copy(update={"tokenizer_hash": hash, "output_ids": ids * 54})
    Spool(traces).append(trace)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.feeder)
        address = stack.enter_context(running(create_app(parts.sidecar, pages=parts.pages)))
        http = stack.enter_context(httpx.Client(base_url=address, trust_env=False, timeout=60))
        token = re.findall(r'name="csrf" value="([^"]+)"', http.get("/guard/login").text)[0]
        fields = {"csrf": token, "name": "ann", "password": PASSWORD}
        assert http.post("/guard/login", data=fields).status_code == 303
        while "lamp" not in (listed := http.get("/guard/traces").text):
            assert "No trace passes this filter." in listed
        assert parts.model.tokenizer.decode(ids) in http.get("/guard/traces/lamp").text
