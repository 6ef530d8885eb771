"""Labelling needs the request that a step answers to."""

from __future__ import annotations

from pathlib import Path

import pytest

from classifiers.review import from_spool
from guard.errors import UserError
from guard.traces import Spool
from tests.guard.test_traces import make


def test_traces_without_their_request_are_not_labelled(tmp_path: Path) -> None:
    Spool(tmp_path).append(make().keeping("ids"))
    with pytest.raises(UserError, match=r"No trace in .* holds its request; got log_content: ids; wanted traces of"):
        from_spool(tmp_path, None)
