"""Requests made by schemathesis out of a sidecar's own OpenAPI document: such as fit it, such as do not, and those at
the edges of what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

#: No 5xx; and every answer is one that the document names.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method",
)  # fmt: skip


def fuzz(url: str, examples: int, directory: Path, *options: str, edges: bool = True) -> int:
    """Asks a running sidecar, each operation `examples` times (and at its edges), the same every time; returns how many
    requests that were.

    AssertionError with what was asked and answered where a check failed. As a process of its own: schemathesis 4.32's
    part for pytest does not know pytest 9.2.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url.rstrip('/')}/openapi.json", "--workers=1",
        f"--phases={'coverage,' if edges else ''}fuzzing", f"--max-examples={examples}", "--generation-deterministic",
        f"--checks={','.join(CHECKS)}", "--continue-on-failure", "--no-color", *options,
    ]  # fmt: skip
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    sent = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert sent is not None, done.stdout
    return int(sent[1])
