"""What can be asked about time-outs at the control socket.  A piece of each in a turn of the loop; changes are logged.

bans.list     network, reason, older, newer -> {source, reason, since, until, ends_in_s, before, dropped, ...}, ...,
              {"end": true, "running"}; older and newer are ages in s, by the time-out's start
bans.add      source, seconds, reason -> the same of the one;    bans.remove  source;    bans.clear
bans.import   items: [{source, until: s since 1970 or seconds, note}], at most ITEMS; dry_run -> {"end": true,
              "outcomes": [["added" | "kept" | "ended" | "exempt" | "wrong", text], ...]}, one for each item
bans.history  after, since, network, reason -> what tt.ban_history shows, oldest first, then {"end": true, "last",
              "lost": how many of what was asked for are no longer held}; after: a number; since: s since 1970
bans.watch    network, reason -> the same as they come, with "event": "begun" or "ended"; {"lost": how many} where
              the client has not read fast enough.  It ends when the client goes away or sends anything
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from tt import asking, sources, spoke
from tt._core import REASONS, Networks, Server, TimeoutRecord, TimeoutTable, source_text
from tt.asking import PIECE, PIECE_ENDS, Answer, Caller, RequestError, say_done
from tt.ban_history import Watcher, utc_text
from tt.guard import Guard
from tt.kernel_gate import packed

SHORTEST, LONGEST = 1, 30 * 86400  # s
ITEMS = 64  # of an import, in one request: done in one turn of the loop, in about 0.5 ms
NS = 1_000_000_000
# What a time-out, or an entry of a map, can have as its reason.
REASON_NAMES = (*(name for name, times_out, _ in REASONS if times_out), "preloaded")


class Wanted:
    """Which time-outs are asked for, by network and reason."""

    def __init__(self, request: Mapping[str, Any], ipv6_prefix: int) -> None:
        self.network = asking.optional_network(request, "network")
        self.reason = asking.optional_text(request, "reason")
        if self.reason is not None and self.reason not in REASON_NAMES:
            raise RequestError(f"no reason {self.reason[:40]!r}; there are {', '.join(REASON_NAMES)}")
        # In C: a list of 50,000, or a flood while somebody watches, asks for each.
        self._networks = None if self.network is None else Networks((self.network,), ipv6_prefix)

    def takes(self, reason: str, source: str) -> bool:
        """Whether this one is, by the text of its source."""
        return self.reason in (None, reason) and (self._networks is None or self._networks.touches(source))


class BanRequests:
    """All of them, by their names; the calls are the loop's."""

    def __init__(self, server: Server, table: TimeoutTable, guard: Guard) -> None:
        self._server = server
        self._table = table
        self._guard = guard
        self._history = guard.history
        self._imported: Counter[Caller] = Counter()  # not logged yet
        self.all: dict[str, Callable[[Mapping[str, Any], Caller], Answer]] = {
            "bans.list": self._list,
            "bans.add": self._add,
            "bans.import": self._import,
            "bans.remove": self._remove,
            "bans.clear": self._clear,
            "bans.history": self._past,
            "bans.watch": self._watch,
        }

    # ---- what runs --------------------------------------------------------------------------------------------------

    def _list(self, request: Mapping[str, Any], _caller: Caller) -> Answer:
        wanted = Wanted(request, self._table.ipv6_prefix)
        older, newer = (asking.optional_number(request, name) for name in ("older", "newer"))
        now = time.monotonic_ns()
        latest = math.inf if older is None else now - older * NS
        earliest = -math.inf if newer is None else now - newer * NS
        in_kernel: set[bytes] | None = None
        preloaded: list[str] = []
        if self._guard.gate is not None:
            in_kernel = set()
            for _ in self._guard.gate.survey(in_kernel, preloaded):
                yield PIECE_ENDS
        for record in self._running():
            if record is None:
                yield PIECE_ENDS
            elif earliest <= record.start <= latest and wanted.takes(REASONS[record.reason][0], record.source):
                yield self._shown(record, in_kernel)
        for source in preloaded if older is None and newer is None else ():  # when they began nobody knows
            if wanted.reason in (None, "preloaded") and asking.within(source, wanted.network):
                yield {"source": source, "reason": "preloaded"}
        yield {"end": True, "running": self._table.running}

    def _running(self) -> Iterator[TimeoutRecord | None]:
        """All that runs; None ends a piece, so that the loop goes on with the others."""
        place: int | None = 0
        while place is not None:
            records, place = self._table.page(place, PIECE, time.monotonic_ns())
            yield from records
            yield None

    def _shown(self, record: TimeoutRecord, in_kernel: Container[bytes] | None) -> dict[str, Any]:
        now = time.monotonic_ns()
        past = time.time_ns() - now
        key = packed(record.source) if in_kernel is not None or self._guard.notes else b""
        return {
            "source": record.source,
            "reason": REASONS[record.reason][0],
            "since": utc_text((past + record.start) // NS),
            "until": utc_text((past + record.end) // NS),
            "ends_in_s": (record.end - now) // 1_000_000 / 1000,
            "before": record.before,
            "dropped": record.dropped,
            "in_kernel": None if in_kernel is None else key in in_kernel,
            "looks": spoke.NAMES[record.spoke],
            "note": self._guard.notes.get(key),
            "proxied": record.proxied,
        }

    # ---- what is changed by hand ------------------------------------------------------------------------------------

    def _add(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        source, note = asking.text(request, "source"), asking.note(request)
        seconds = _length(request.get("seconds", self._guard.settings.timeout))
        if why := self._guard.why_spared(source_text(source, self._table.ipv6_prefix)):
            raise RequestError(f"{source} is {why}")
        record = self._time_out(source, seconds, note)
        say_done(caller, "bans.add", source=record.source, seconds=float(seconds), note=note)
        yield {"end": True, **self._shown(record, None)}

    def _time_out(self, source: str, seconds: float, note: str | None) -> TimeoutRecord:
        record = self._server.time_out(source, int(seconds * NS))
        if note:
            self._guard.notes[packed(record.source)] = note
        return record

    def _import(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        items, dry_run = request.get("items"), request.get("dry_run") is True
        if not isinstance(items, list) or len(items) > ITEMS or not all(isinstance(item, dict) for item in items):
            raise RequestError(f"the request needs 'items', a list of at most {ITEMS} objects")
        outcomes = [self._import_one(item, dry_run) for item in items]
        if not dry_run and (added := sum(outcome == "added" for outcome, _ in outcomes)):
            self._imported[caller] += added
        yield {"end": True, "outcomes": outcomes}

    def _import_one(self, item: Mapping[str, Any], dry_run: bool) -> tuple[str, str]:
        try:
            source = source_text(asking.text(item, "source"), self._table.ipv6_prefix)
            seconds, note = _time_left(item), asking.note(item, "note")
        except (RequestError, ValueError) as error:
            return "wrong", str(error)
        if seconds < SHORTEST:
            return "ended", ""
        if self._guard.spares(source):
            return "exempt", ""
        running = self._table.find(source, time.monotonic_ns())
        # A second that is the difference of two clocks and of what was rounded renews nothing.
        if running is not None and running.end + NS >= time.monotonic_ns() + seconds * NS:
            return "kept", ""
        if not dry_run:
            self._time_out(source, seconds, note)
        return "added", ""

    def tick(self) -> None:
        """About once a second: an import comes in many requests, and the log needs no line for each."""
        for caller, count in self._imported.items():
            say_done(caller, "bans.import", added=count)
        self._imported.clear()

    def _remove(self, request: Mapping[str, Any], caller: Caller) -> Answer:
        network = asking.network(asking.text(request, "source"))
        if not _is_source(network, self._table.ipv6_prefix):
            yield from self._lift_within(network, caller)
            return
        source = source_text(str(network.network_address), self._table.ipv6_prefix)
        running, known = self._guard.release(source)
        if running or known:
            say_done(caller, "bans.remove", source=source, removed=int(running))
        # What was written here goes at the end of this turn; somebody else's entry stays, and goes on dropping.
        others = self._guard.gate and self._guard.gate.others(packed(source))
        yield {"end": True, "removed": int(running), "forgotten": known and not running, "others": others}

    def _clear(self, _request: Mapping[str, Any], caller: Caller) -> Answer:
        yield from self._lift_within(None, caller)

    def _lift_within(self, network: sources.Network | None, caller: Caller) -> Answer:
        count = 0
        try:
            for record in self._running():
                if record is None:
                    yield PIECE_ENDS
                elif asking.within(record.source, network):
                    count += self._guard.release(record.source).known
        finally:  # also where he went away in the middle: what was lifted until then stays so
            if count:
                say_done(caller, "bans.remove" if network else "bans.clear", source=network, removed=count)
        yield {"end": True, "removed": count}

    # ---- what was, and what comes -----------------------------------------------------------------------------------

    def _past(self, request: Mapping[str, Any], _caller: Caller) -> Answer:
        history, wanted = self._history, Wanted(request, self._table.ipv6_prefix)
        after, since = (asking.optional_number(request, name) for name in ("after", "since"))
        earliest = since or 0  # s, and compared as s: who asks has it from "at_s"
        number, last = max(0, int(after or 0)) + 1, history.last
        lost = 0
        while number <= last:
            if number < history.oldest:  # also while this is made
                oldest = history.get(history.oldest)
                # Where the oldest one held is older than what is asked for, so are those before it.
                lost += history.oldest - number if oldest is None or oldest.at / NS >= earliest else 0
                number = history.oldest
            for entry in map(history.get, range(number, min(number + PIECE, last + 1))):
                if entry is not None and entry.at / NS >= earliest and wanted.takes(entry.reason, entry.source):
                    yield entry.shown()
            number += PIECE
            yield PIECE_ENDS
        yield {"end": True, "last": last, "lost": lost}

    def _watch(self, request: Mapping[str, Any], _caller: Caller) -> Answer:
        wanted = Wanted(request, self._table.ipv6_prefix)
        watcher = Watcher(lambda entry: wanted.takes(entry.reason, entry.source))
        self._history.watchers.add(watcher)
        try:
            while True:
                yield from watcher.take(PIECE)
                yield PIECE_ENDS
                yield watcher.wait()
        finally:
            self._history.watchers.discard(watcher)


def _length(seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not SHORTEST <= seconds <= LONGEST:
        raise RequestError(f"a time-out of {seconds!r:.20} s: it must be 1 s to {LONGEST // 86400} days")
    return seconds


def _time_left(item: Mapping[str, Any]) -> float:
    """Of an imported time-out, s; what is over already may be negative."""
    until = asking.optional_number(item, "until")
    if until is None:
        return _length(item.get("seconds"))
    left = until - time.time()
    if left > LONGEST:
        raise RequestError(f"its end is in {left / 86400:.0f} days: it must be within {LONGEST // 86400}")
    return left


def _is_source(network: sources.Network, ipv6_prefix: int) -> bool:
    """Whether it stands for one source.  A link-local address is one by itself, so its /64 is many."""
    if network.version == 6 and network.prefixlen == ipv6_prefix:
        return not network.is_link_local
    return network.num_addresses == 1
