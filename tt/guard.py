"""What is done about time-outs in Python: said in the log, saved to the disk, and told to who wants to know.

The table is in the extension and decides; this file hears of new and ended time-outs once a turn of the loop, and of
the clock once a second.  Rules: nothing here blocks the loop: the log never waits, and what is saved is copied first
and written by a thread.  A failure to save weakens no time-out.
It must not know sockets or frames.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from tt import ban_history, log, sources, spoke, timeouts
from tt._core import REASON_CODES, Networks, TimedOut, TimeoutTable
from tt.ban_history import BanHistory, Entry
from tt.config import Config
from tt.exemptions import Entries, Exemptions
from tt.front import Front
from tt.kernel_gate import KernelGate, packed
from tt.state_file import StateFileError

MINUTE = 60.0
NS = 1e9
# The saved table holds numbers of these names; a version with other lists must not read them as its own.
NAMES_STAMP = crc32("\n".join([*REASON_CODES, *spoke.NAMES]).encode())
SPOKE_CODES = {name: code for code, name in enumerate(spoke.NAMES)}
HISTORY_FILE = "ban-history"  # beside the saved table
EXEMPT_FILE = "exempt"
LIFTED_AT_ONCE = 128  # time-outs, in a turn of the loop


class Released(NamedTuple):
    """What lifting a source found."""

    running: bool  # its time-out ran
    known: bool  # its repeats are forgotten


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
        self.notes: dict[bytes, str] = {}  # why a source, packed, was timed out by hand
        self.lift: Callable[[str], bool] = table.remove  # once the loop runs, that of the server
        self.history = BanHistory(table)
        self._table = table
        self._file = file
        self._history_file = file.with_name(HISTORY_FILE)
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
        self.front = Front()
        self.exemptions = Exemptions(file.with_name(EXEMPT_FILE))
        try:
            self.exemptions.load()
        except StateFileError as error:
            log.event(logging.ERROR, "exemptions not restored, going on without them", error=str(error))
        self.configure(settings, gateways)

    def configure(self, settings: Config, gateways: tuple[sources.Network, ...]) -> None:
        """Take a new configuration."""
        self.settings = settings
        self._limiter.per_second = settings.log_timeouts_per_second
        self.gateways = gateways
        self.take_exemptions(self.exemptions.entries)
        prefix = settings.ipv6_prefix
        self._own = {"loopback": Networks(sources.LOOPBACK, prefix), "gateways": Networks(gateways, prefix)}
        self.lift_exempt()

    @property
    def spared(self) -> tuple[sources.Network, ...]:
        """Whom no time-out may hit: the exempt, and the proxies, which are their clients' way in."""
        return (*self.exempt, *self.settings.proxy_from)

    # ---- what the loop tells ----------------------------------------------------------------------------------------

    def turn(self, added: Sequence[TimedOut], ended: Sequence[bytes]) -> None:
        """New and ended time-outs of one turn."""
        if self.gate is not None:  # before all else: until then the kernel lets them in
            self.gate.turn(added, ended, self._table)
        now_ns, utc_now = time.monotonic_ns(), time.time_ns()
        now = now_ns / NS
        self._changed = True
        since = self.history.last
        for timed_out in added:
            name = spoke.identify(timed_out.first) if timed_out.first else None
            note = self.notes.get(timed_out.key)
            if timed_out.end:
                if name:
                    self._table.set_spoke(timed_out.key, SPOKE_CODES[name], now_ns)
                self.history.begin(timed_out, name, note, now_ns, utc_now)
            self._warn_of_own(timed_out)
            if not timed_out.proxied and timed_out.reason != "operator":
                self.front.arrived(timed_out.source, stranger=True)
            if self._limiter.allow(now):
                _say(timed_out, name, note)
        if ended:
            self.history.end(ended, since, now_ns, utc_now)
            self._drop_notes(ended, now_ns)
        self._say_left_out(now)
        self._handler.flush()

    def _drop_notes(self, ended: Sequence[bytes], now: int) -> None:
        for key in ended if self.notes else ():
            # One that was lifted and is timed out again in the same turn has the new one's note by now.
            if key in self.notes and self._table.find(key, now) is None:
                del self.notes[key]

    def tick(self) -> None:
        """About once a second: what is due."""
        now = time.monotonic()
        self._say_left_out(now)
        self._say_accept_failures(now)
        self.front.tick(self.counters()["closed"]["bad_proxy"], now)
        if now - self._counted_at >= MINUTE:
            self._counted_at = now
            self._say_dropped()
        if self.gate is not None:
            self.gate.tick()
        if self._changed and now - self._saved_at >= self.settings.save_interval:
            self._save_in_thread(now)
        self._handler.flush()

    @property
    def log_dropped_lines(self) -> int:
        """Since the start."""
        return self._handler.dropped_lines

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
            if word not in self._warned and networks.touches(timed_out.key):
                self._warned.add(word)
                remedy = f"tt bans remove {timed_out.source}; or serve with --exempt {word}"
                words = f"timed out an address of {word}: everybody behind it waits"
                log.event(logging.WARNING, words, source=timed_out.source, remedy=remedy)

    # ---- lifting ----------------------------------------------------------------------------------------------------

    def release(self, source: str, *, told: bool = True) -> Released:
        """Lifts the time-out of a source, in its canonical text; `told`: the loop will tell of its end.

        Where a time-out is lifted it is done here, so that the history knows that it did not end by itself.
        """
        now = time.monotonic_ns()
        record = self._table.find(source, now)
        known = self.lift(source)
        if known:
            self.notes.pop(packed(source), None)
            self.history.lift(packed(source), record and record.dropped, now, time.time_ns(), told=told)
        return Released(record is not None, known)

    def lift_exempt(self, *, told: bool = True) -> None:
        """Who is exempt now, and was timed out before, need not wait for his end."""
        for _ in self.lifting_exempt(told=told):
            pass

    def lifting_exempt(self, *, told: bool = True) -> Generator[int]:
        """The same in pieces, so that the loop can go on meanwhile; each gives how many are lifted by then.

        Closed before its end it does the rest at once.
        """
        left = iter(self._table.within(self._spared, time.monotonic_ns()))
        lifted: list[str] = []
        try:
            while piece := list(islice(left, LIFTED_AT_ONCE)):
                lifted += [source for source in piece if self.release(source, told=told).known]
                yield len(lifted)
        finally:
            lifted += [source for source in left if self.release(source, told=told).known]
            if lifted:
                words = "time-outs lifted of sources that are exempt now"
                log.event(logging.INFO, words, count=len(lifted), first=", ".join(lifted[:10]))

    # ---- exemptions -------------------------------------------------------------------------------------------------

    def take_exemptions(self, entries: Entries) -> None:
        """Those made at run time, from here on.  The loop has its own copy of `exempt`, and lifting is another step."""
        self.exemptions.entries = entries
        self.exempt = sources.resolve((*self.settings.exempt, *entries), self.gateways)
        self._spared = Networks(self.spared, self.settings.ipv6_prefix)

    def spares(self, source: str) -> bool:
        """Whether a source is exempt or a proxy, in part at least."""
        return self._spared.touches(source)

    def why_spared(self, address: str) -> str | None:
        """Of a source or network that is exempt or a proxy, in part at least: what to do before it can be timed out."""
        if sources.holds(self.settings.proxy_from, address):
            return "a proxy: take it out of `proxy_from` first, then send the server a SIGHUP"
        if sources.holds(sources.resolve(self.settings.exempt, self.gateways), address):
            return "exempt: take it out of `exempt` first, then send the server a SIGHUP"
        for one in self.exemptions.entries:
            if sources.holds(sources.resolve((one,), self.gateways), address):
                return f"exempt: use 'tt exempt remove {one}' first"
        return None

    # ---- saving -----------------------------------------------------------------------------------------------------

    def restore(self, gate: KernelGate | None = None) -> None:
        """Read what was saved; a bad file is said, and it starts empty.  Then bring a kernel map in line."""
        self._load()
        self._load_history()
        self.lift_exempt(told=False)
        if gate is not None:
            gate.reconcile(self._table, self.spared, time.monotonic_ns())
            self.gate = gate

    def close(self) -> bool:
        """At a clean stop: save.  False: that failed."""
        self._save_now()
        return not self._changed

    def _load(self) -> None:
        try:
            count = timeouts.load(self._file, self._table, time.monotonic_ns(), time.time_ns(), NAMES_STAMP)
        except StateFileError as error:
            log.event(logging.ERROR, "time-outs not restored, starting with none", error=str(error))
            return
        if count:
            log.event(
                logging.INFO, "time-outs restored", running=self._table.running, remembered=self._table.remembered
            )

    def _load_history(self) -> None:
        try:
            self.notes |= self.history.restore(self._history_file, time.monotonic_ns(), time.time_ns())
        except StateFileError as error:
            log.event(logging.ERROR, "ban history not restored, starting with none", error=str(error))

    def _save_now(self) -> None:
        """Save in this thread; waits for a save under way."""
        if self._saving is not None:
            self._saving.join()
        if self._changed:
            self._changed = False
            self._save(*self._snapshot())

    def _save_in_thread(self, now: float) -> None:
        if self._saving is not None and self._saving.is_alive():
            return
        self._saved_at = now
        saving = threading.Thread(target=self._save, args=self._snapshot(), name="tt-save", daemon=True)
        self._changed = False
        try:
            saving.start()
        except RuntimeError as error:  # no thread to be had: tried again at the next interval
            self._changed = True
            log.event(logging.ERROR, "time-outs not saved", error=str(error))
        else:
            self._saving = saving

    def _snapshot(self) -> tuple[bytes, Sequence[Entry], int]:
        return self._table.dump(time.monotonic_ns()), self.history.snapshot(), time.time_ns()

    def _save(self, dump: bytes, entries: Sequence[Entry], utc_now: int) -> None:
        try:
            timeouts.save(self._file, dump, utc_now, NAMES_STAMP)
            ban_history.save(self._history_file, entries, utc_now)
        except StateFileError as error:
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
