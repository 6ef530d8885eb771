"""Feeds the store from the spool beside `serve`, in a thread of its own: no response waits for it.

The spool is what survives; the store may be down, slow or full, and is fed again from where it stands.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from guard.errors import UserError
from guard.sidecar.metrics import Metrics
from guard.store.ingest import Ingester
from guard.store.spool import sizes
from guard.store.store import Store, reason

log = logging.getLogger(__name__)

IDLE = 1.0
"""Seconds between two looks at the spool."""
PAUSE = 0.05
"""Seconds between two batches: whoever answers requests gets the processor in between."""
LONGEST = 30.0
"""Seconds between two tries of a store that is down, at most."""
BATCH_LINES = 16
"""Smaller than by hand: a batch holds the interpreter for some milliseconds."""
_DRAIN_SECONDS = 3.0
_STOP_SECONDS = 8.0


class Feeder:
    """Keeps one store fed from one directory while it is entered."""

    def __init__(self, directory: Path, url: str, metrics: Metrics) -> None:
        self._directory, self._url, self._metrics = directory, url, metrics
        self._ingester: Ingester | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-feeder", daemon=True)
        self.problem: str | None = None
        """Why the store is not fed; None when it is."""

    def open(self) -> None:
        """Makes or updates the store's tables. UserError for a URL that is none, or tables of a newer version; a store
        that is down is no error."""
        try:
            self._open()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a store that is down never stops serving
            self._failed(error)

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            wait = self._turn(wait)
        if self.problem is None:
            # What the last responses have left; a long backlog waits in the spool for the next start.
            end = time.monotonic() + _DRAIN_SECONDS
            while time.monotonic() < end and self._turn(0.0) == PAUSE:
                pass

    def _turn(self, waited: float) -> float:
        """One batch, or one try; returns the seconds until the next."""
        try:
            ingester = self._ingester or self._open()
            fed = ingester.step()
        except Exception as error:  # noqa: BLE001 - a store that is down never stops serving
            self._failed(error)
            return min(LONGEST, max(IDLE, 2 * waited))
        finally:
            self._metrics.store_behind.set(self._behind())
        if self.problem is not None:
            log.warning("the store is fed again")
        self.problem = None
        self._metrics.store_up.set(1)
        if fed is None:
            return IDLE
        self._metrics.store_traces.inc(fed.traces)
        self._metrics.store_malformed.inc(fed.malformed)
        return PAUSE

    def _open(self) -> Ingester:
        self._ingester = Ingester(Store.open(self._url, migrate=True), self._directory, BATCH_LINES)
        return self._ingester

    def _behind(self) -> int:
        # Before the first connection nothing is known of what the store holds.
        return self._ingester.behind() if self._ingester else sum(sizes(self._directory).values())

    def _failed(self, error: Exception) -> None:
        said = reason(error)
        if said != self.problem:
            log.warning("the store is not fed, traces wait in the spool: %s", said)
        self.problem = said
        self._metrics.store_up.set(0)
        self._metrics.store_failures.inc()
