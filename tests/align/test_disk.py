"""Files that only grow, and a full disk: a limit on the size of a file makes the kernel refuse the same `write`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align.disk import append_line, full_disk_told, one_writer, read_lines
from align.watermark import Consumed
from guard.errors import UserError
from tests.test_cli import ROOT

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from align.disk import full_disk_told
from guard.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
writes = {"plain": lambda: path.write_bytes(bytes(200_000)),
          "safetensors": lambda: save_file({"a": np.zeros(200_000)}, path)}
try:
    with full_disk_told(path.parent):
        writes[sys.argv[2]]()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["plain", "safetensors"])
def test_a_full_disk_is_told_whoever_writes(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "file"), how]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.stdout.startswith(f"The disk under {tmp_path} is full; got File too large. Make room"), told.stderr


def test_other_errors_pass() -> None:
    for error in (FileNotFoundError(2, "No such file"), ValueError("x"), UserError("No space left on device")):
        with pytest.raises(type(error)) as raised, full_disk_told(Path()):
            raise error
        assert raised.value is error


def test_lines_are_appended_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path, Consumed) == []
    runs = [Consumed(run=name, base="b", guard_ids=["ü\u2028"]) for name in ("one", "two")]
    append_line(path, runs[0].model_dump_json())
    with path.open("a") as file:
        file.write('{"run": "torn')
    append_line(path, runs[1].model_dump_json())
    assert read_lines(path, Consumed) == runs


def test_a_lock_is_waited_for_as_long_as_it_says(tmp_path: Path) -> None:
    taken, held, end = UserError("taken"), threading.Event(), threading.Event()

    def hold() -> None:
        with one_writer(tmp_path, taken):
            held.set()
            end.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    with one_writer(tmp_path, taken, name=".other"):
        pass
    for patience in (0.0, 0.3):
        began = time.monotonic()
        with pytest.raises(UserError, match="taken"), one_writer(tmp_path, taken, patience=patience):
            pass
        assert time.monotonic() - began >= patience
    threading.Timer(0.3, end.set).start()
    with one_writer(tmp_path, taken, patience=60):
        assert end.is_set()
    holder.join()
