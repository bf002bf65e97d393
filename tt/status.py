"""All that the server counts, gathered from who counts it: one object, for `tt status`, `tt top` and the metrics.

Rules: the loop's thread alone takes it, so that nothing in it is half changed, and it costs no more than a few system
calls whatever the server holds.  What is called a count only grows while the process lives.
It must not know who asks, nor how it is shown.
"""

import os
import resource
import time
from pathlib import Path
from typing import Any

from tt import __version__
from tt._core import REASONS, Server, TimeoutTable
from tt.ban_history import EXPIRED, LIFTED, RENEWED
from tt.catalog.service import Service
from tt.dispatch import Dispatcher
from tt.guard import Guard

TIMES_OUT = tuple(name for name, times_out, _ in REASONS if times_out)
PROC = Path("/proc/self")
PAGE = resource.getpagesize()  # bytes
# Fields of proc(5)'s stat, counted from the one behind the command's name.
THREADS, RESIDENT = 17, 21


class Status:
    """The parts of a running server that count."""

    def __init__(
        self, server: Server, table: TimeoutTable, guard: Guard, dispatcher: Dispatcher, catalog: Service | None
    ) -> None:
        self._server = server
        self._table = table
        self._guard = guard
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._started = time.monotonic()
        self._started_utc = time.time()

    def take(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; docs/metrics.md has the meaning of most."""
        return {**self.counts(), "process": process()}

    def counts(self) -> dict[str, Any]:
        """Without what the kernel counts of the process: asking it, the loop would let go of the GIL."""
        guard, gate, history = self._guard, self._guard.gate, self._guard.history
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_s": round(self._started_utc, 3),  # since 1970 UTC
            "uptime_s": round(time.monotonic() - self._started, 3),
            "observe": guard.settings.observe,
            "exempt": [str(network) for network in guard.exempt],
            **self._server.counters(),
            "old_key_handshakes": self._dispatcher.old_key_handshakes if self._dispatcher.keys[1:] else None,
            "table": {
                "running": self._table.running,
                "remembered": self._table.remembered,
                "evictions": self._table.evictions,
                "size": guard.settings.table_size,
            },
            "timeouts": {name: history.begun[name] for name in TIMES_OUT},
            "timeouts_expired": history.ended[EXPIRED],
            "timeouts_lifted": history.ended[LIFTED],
            "timeouts_renewed": history.ended[RENEWED],
            "history": history.status(),
            "gate": gate and gate.status(),
            "catalog": self._catalog and self._catalog.status(),
            "log_dropped_lines": guard.log_dropped_lines,
        }


def process() -> dict[str, Any] | None:
    """What the kernel counts of this process; None where there is no /proc.

    `descriptors` is None before Linux 6.2, which does not count them: to list 19,000 takes 0.1 s.
    """
    try:
        fields = (PROC / "stat").read_bytes().rpartition(b")")[2].split()
        descriptors = (PROC / "fd").stat().st_size or None
    except OSError:
        return None
    return {
        "rss_bytes": int(fields[RESIDENT]) * PAGE,
        "cpu_seconds": time.process_time(),
        "descriptors": descriptors,
        "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "threads": int(fields[THREADS]),
    }
