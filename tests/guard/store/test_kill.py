"""`kill -9` of real processes that feed a store, between two batches and inside one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

from guard.store.ingest import Ingester
from guard.store.reading import count
from guard.store.store import Store
from guard.traces import Spool
from tests.guard.store.kit import dump, variant, write

ROOT = Path(__file__).parents[3]
FEED = """
    import sys, time
    from pathlib import Path
    from guard.store import ingest
    from guard.store.store import Store
    directory, url, inside = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "inside"
    if inside:
        def wait(*_):  # everything of the batch is written but the offset
            print("inside", flush=True)
            time.sleep(60)
        ingest._advance = wait
    ingester = ingest.Ingester(Store.open(url, migrate=True), directory, batch_lines=3)
    print("ready", flush=True)
    while True:
        if ingester.step() is None:
            time.sleep(0.002)
"""


def feeder(directory: Path, url: str, where: str = "anywhere") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(FEED), str(directory), url, where]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.communicate()


def test_killed_inside_a_batch_the_batch_is_undone(url: str, tmp_path: Path) -> None:
    write(tmp_path / "spool", [variant(f"g{i}", i) for i in range(9)])
    store = Store.open(url, migrate=True)
    assert Ingester(store, tmp_path / "spool", batch_lines=4).step() is not None
    before = dump(store)
    assert len(before["traces"]) == 4
    process = feeder(tmp_path / "spool", url, "inside")
    assert [said(process), said(process)] == ["ready", "inside"]
    kill(process)
    assert dump(store) == before
    Ingester(store, tmp_path / "spool").run()
    assert [row["guard_id"] for row in dump(store)["traces"]] == [f"g{i}" for i in range(9)]
    store.close()


def test_killed_again_and_again_while_the_spool_grows(new_url: Callable[[], str], tmp_path: Path) -> None:
    url, directory, rng = new_url(), tmp_path / "spool", random.Random(0)
    stop = threading.Event()
    appended = []

    def append() -> None:
        spool = Spool(directory)
        while not stop.wait(0.003):
            # Every third request was preempted and is written again.
            number = len(appended)
            appended.append(number)
            spool.append(variant(f"g{number - 2 if number % 3 == 2 else number}", number))

    writer = threading.Thread(target=append)
    writer.start()
    reached = [0]
    store = Store.open(url, migrate=True)
    for _ in range(2):
        processes = [feeder(directory, url) for _ in range(2)]
        assert {said(process) for process in processes} == {"ready"}
        while count(store) <= reached[-1]:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        for process in processes:
            kill(process)
        reached.append(count(store))
    stop.set()
    writer.join()
    total = len({n - 2 if n % 3 == 2 else n for n in appended})
    # None of them had come to the end.
    assert reached[-1] < total
    Ingester(store, directory).run()
    whole = Store.open(new_url(), migrate=True)
    Ingester(whole, directory).run()
    assert len(dump(store)["traces"]) == total
    assert dump(store) == dump(whole)
    store.close()
    whole.close()
