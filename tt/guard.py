"""What is done about time-outs in Python: said in the log, saved to the disk, and told to who wants to know.

The table is in the extension and decides; this file hears of new and ended time-outs once a turn of the loop, and of
the clock once a second.  Rules: nothing here blocks the loop: the log never waits, and the saved table is copied first
and written by a thread.  A failure to save weakens no time-out.
It must not know sockets or frames.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from zlib import crc32

from tt import log, sources, spoke, timeouts
from tt._core import REASON_CODES, Networks, TimedOut, TimeoutTable, source_text
from tt.config import Config
from tt.kernel_gate import KernelGate

MINUTE = 60.0
NS = 1e9
# The saved table holds numbers of these names; a version with other lists must not read them as its own.
NAMES_STAMP = crc32("\n".join([*REASON_CODES, *spoke.NAMES]).encode())
SPOKE_CODES = {name: code for code, name in enumerate(spoke.NAMES)}


class Guard:
    """The time-out table's keeper; all calls but the saving thread's are the loop's."""

    def __init__(
        self,
        settings: Config,
        table: TimeoutTable,
        file: Path,
        gateways: tuple[sources.Network, ...],
        handler: log.Handler,
    ) -> None:
        self.counters: Callable[[], Mapping[str, Any]] = dict
        self.gate: KernelGate | None = None
        self.notes: dict[str, str] = {}  # why a source was timed out by hand
        self.lift: Callable[[str], bool] = table.remove  # once the loop runs, that of the server
        self._table = table
        self._file = file
        self._handler = handler
        self._saving: threading.Thread | None = None
        self._saved_at = time.monotonic()
        self._changed = False
        self._counted_at = time.monotonic()
        self._dropped = 0
        self._accept_failures = 0
        self._accept_complained = float("-inf")
        self._warned: set[str] = set()
        self._limiter = log.Limiter(settings.log_timeouts_per_second)
        self.configure(settings, gateways)

    def configure(self, settings: Config, gateways: tuple[sources.Network, ...]) -> None:
        """Take a new configuration."""
        self.settings = settings
        self._limiter.per_second = settings.log_timeouts_per_second
        self.exempt = sources.resolve(settings.exempt, gateways)
        prefix = settings.ipv6_prefix
        self._own = {"loopback": Networks(sources.LOOPBACK, prefix), "gateways": Networks(gateways, prefix)}
        self._lift_exempt()

    # ---- what the loop tells ----------------------------------------------------------------------------------------

    def turn(self, added: Sequence[TimedOut], ended: Sequence[bytes]) -> None:
        """New and ended time-outs of one turn."""
        if self.gate is not None:  # before all else: until then the kernel lets them in
            self.gate.turn(added, ended, self._table)
        now = time.monotonic()
        self._changed = True
        for key in ended if self.notes else ():
            self.notes.pop(source_text(str(ip_address(key)), self._table.ipv6_prefix), None)
        for timed_out in added:
            name = spoke.identify(timed_out.first) if timed_out.first else None
            if timed_out.end and name:
                self._table.set_spoke(timed_out.source, SPOKE_CODES[name], int(now * NS))
            self._warn_of_own(timed_out)
            if self._limiter.allow(now):
                _say(timed_out, name, self.notes.get(timed_out.source))
        self._say_left_out(now)
        self._handler.flush()

    def tick(self) -> None:
        """About once a second: what is due."""
        now = time.monotonic()
        self._say_left_out(now)
        self._say_accept_failures(now)
        if now - self._counted_at >= MINUTE:
            self._counted_at = now
            self._say_dropped()
        if self.gate is not None:
            self.gate.tick()
        if self._changed and now - self._saved_at >= self.settings.save_interval:
            self._save_in_thread(now)
        self._handler.flush()

    def failed(self, error: BaseException) -> None:
        """A failure of our own, which cost one connection or one report."""
        log.LOGGER.error("internal error", exc_info=error)
        self._handler.flush()

    # ---- the log ----------------------------------------------------------------------------------------------------

    def _say_left_out(self, now: float) -> None:
        if count := self._limiter.left_out(now):
            log.event(logging.WARNING, "more time-outs not listed", count=count)

    def _say_dropped(self) -> None:
        dropped = self.counters()["closed"]["timed_out"]
        if count := dropped - self._dropped:
            log.event(logging.INFO, "connections of timed-out sources closed", count=count, running=self._table.running)
        self._dropped = dropped

    def _say_accept_failures(self, now: float) -> None:
        """At most once a minute: while descriptors lack, every turn fails."""
        failures = self.counters()["accept_failures"]
        if failures != self._accept_failures and now - self._accept_complained >= MINUTE:
            count, self._accept_failures, self._accept_complained = failures - self._accept_failures, failures, now
            words = "accept failed for want of descriptors or memory, connections wait"
            log.event(logging.ERROR, words, count=count, remedy="lower max_connections, or raise the descriptor limit")

    def _warn_of_own(self, timed_out: TimedOut) -> None:
        """Locking out one's own monitor or gateway is what costs operators weeks: said once, with the remedy."""
        if not timed_out.end:
            return
        for word, networks in self._own.items():
            if word not in self._warned and networks.touches(timed_out.source):
                self._warned.add(word)
                remedy = f"tt bans remove {timed_out.source}; or serve with --exempt {word}"
                words = f"timed out an address of {word}: everybody behind it waits"
                log.event(logging.WARNING, words, source=timed_out.source, remedy=remedy)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def restore(self, gate: KernelGate | None = None) -> None:
        """Read the saved table; a bad file is said, and the table starts empty.  Then bring a kernel map in line."""
        self._load()
        self._lift_exempt()
        if gate is not None:
            gate.reconcile(self._table, self.exempt, time.monotonic_ns())
            self.gate = gate

    def _lift_exempt(self) -> None:
        """Who is exempt now, and was timed out before, need not wait for his end."""
        networks = Networks(self.exempt, self.settings.ipv6_prefix)
        lifted = [source for source in self._table.within(networks, time.monotonic_ns()) if self.lift(source)]
        if lifted:
            words = "time-outs lifted of sources that are exempt now"
            log.event(logging.INFO, words, count=len(lifted), first=", ".join(lifted[:10]))

    def close(self) -> bool:
        """At a clean stop: save.  False: that failed."""
        self._save_now()
        return not self._changed

    def _load(self) -> None:
        try:
            count = timeouts.load(self._file, self._table, time.monotonic_ns(), time.time_ns(), NAMES_STAMP)
        except timeouts.TimeoutsFileError as error:
            log.event(logging.ERROR, "time-outs not restored, starting with none", error=str(error))
            return
        if count:
            log.event(
                logging.INFO, "time-outs restored", running=self._table.running, remembered=self._table.remembered
            )

    def _save_now(self) -> None:
        """Save in this thread; waits for a save under way."""
        if self._saving is not None:
            self._saving.join()
        if self._changed:
            self._changed = False
            self._save(self._table.dump(time.monotonic_ns()), time.time_ns())

    def _save_in_thread(self, now: float) -> None:
        if self._saving is not None and self._saving.is_alive():
            return
        self._saved_at = now
        snapshot = self._table.dump(time.monotonic_ns()), time.time_ns()
        saving = threading.Thread(target=self._save, args=snapshot, name="tt-save", daemon=True)
        self._changed = False
        try:
            saving.start()
        except RuntimeError as error:  # no thread to be had: tried again at the next interval
            self._changed = True
            log.event(logging.ERROR, "time-outs not saved", error=str(error))
        else:
            self._saving = saving

    def _save(self, dump: bytes, utc_now: int) -> None:
        try:
            timeouts.save(self._file, dump, utc_now, NAMES_STAMP)
        except timeouts.TimeoutsFileError as error:
            self._changed = True  # tried again at the next interval
            log.event(logging.ERROR, "time-outs not saved", error=str(error))


def _say(timed_out: TimedOut, name: str | None, note: str | None) -> None:
    fields: dict[str, object] = {"source": timed_out.source, "reason": timed_out.reason}
    if timed_out.end:
        words = "timed out"
        fields |= {"seconds": round((timed_out.end - timed_out.start) / NS, 3), "before": timed_out.before}
    else:
        words = "exempt, disconnected" if timed_out.exempt else "would be timed out"
    log.event(logging.WARNING, words, **fields, looks=name, first=timed_out.first or None, note=note)
