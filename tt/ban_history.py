"""The history of time-outs: the last MOST that began, what became of each, and who is told of them as they come.

A time-out gets the next number when it begins, and numbers go on over a restart.  One is `running` until it has
`expired`; was `lifted` by hand or by an exemption; was `renewed` by the source's next time-out; or `gave way`: over
before its time, since the full table needed its place, or was lost.  The table alone decides who is timed out: this
only tells of it, and more may be running there than are held here.

Rules: bounded, and what a flood needs for each time-out is one object here; what is said of an entry is made when
somebody asks.  All calls but those of the saving thread are the loop's; time is an argument.
It must not know sockets, the log's lines, nor how a time-out is begun or ended.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from tt import log, spoke
from tt._core import REASONS, TimedOut, TimeoutTable
from tt.pending import Pending
from tt.state_file import Sealed

MOST = 10_000  # entries
UNREAD = 4096  # events that one watcher may leave unread; then the oldest are lost to him
PIECE = 250  # entries that the saving thread packs while it has the GIL: about 0.1 ms
NS = 1_000_000_000

RUNNING, EXPIRED, LIFTED, RENEWED, GAVE_WAY = STATES = ("running", "expired", "lifted", "renewed", "gave way")
BEGUN, ENDED = "begun", "ended"  # events

FILE = Sealed("ban history", magic=b"TTBANHIS", version=1, most=32 << 20)


class Entry(msgspec.Struct, array_like=True, gc=False):
    """One time-out.  Saved as it stands, but for `end`, which is another process's clock by then."""

    number: int
    key: bytes  # the packed source
    source: str
    reason: str
    at: int  # when it began: UTC, ns since 1970
    length: int  # ns
    end: int  # ns of CLOCK_MONOTONIC
    before: int
    looks: str
    first: bytes
    note: str | None
    proxied: bool  # learnt behind a PROXY protocol header
    state: str = RUNNING
    ended: int | None = None  # UTC, ns since 1970
    dropped: int | None = None  # connections dropped while it ran, once that is known

    def shown(self) -> dict[str, Any]:
        """As it is told to who asks."""
        return {
            "number": self.number,
            "source": self.source,
            "reason": self.reason,
            "at": utc_text(self.at // NS),
            "at_s": self.at / NS,
            "seconds": self.length // 1_000_000 / 1000,
            "before": self.before,
            "looks": self.looks,
            "first": log.escape(self.first) if self.first else None,
            "note": self.note,
            "proxied": self.proxied,
            "state": self.state,
            "ended": self.ended and utc_text(self.ended // NS),
            "dropped": self.dropped,
        }


class Coming(Pending):
    """Done when something comes, if ever: who waits for it may go away meanwhile."""


class Watcher:
    """One who is told of what comes: a queue that is bounded, so that who does not read costs no more."""

    def __init__(self, wants: Callable[[Entry], bool]) -> None:
        self._wants = wants
        self._events: deque[tuple[str, Entry]] = deque()
        self._lost = 0
        self._waits: Coming | None = None

    def tell(self, event: str, entry: Entry) -> None:
        if not self._wants(entry):
            return
        if len(self._events) >= UNREAD:
            self._events.popleft()
            self._lost += 1
        self._events.append((event, entry))
        if self._waits is not None:
            waits, self._waits = self._waits, None
            waits.finish()

    def wait(self) -> Coming:
        """Done as soon as there is something to take."""
        waits = Coming()
        if self._events:
            waits.finish()
        else:
            self._waits = waits
        return waits

    def take(self, most: int) -> list[dict[str, Any]]:
        """The next events, at most so many, and before them how many were lost."""
        taken: list[dict[str, Any]] = []
        if self._lost:
            taken.append({"lost": self._lost})
            self._lost = 0
        while self._events and len(taken) < most:
            event, entry = self._events.popleft()
            shown = {"event": event, **entry.shown()}
            # It may have ended since: what is told of its beginning was true then.
            taken.append(shown | {"state": RUNNING, "ended": None, "dropped": None} if event == BEGUN else shown)
        return taken


class BanHistory:
    """What began and ended, by number and by source."""

    def __init__(self, table: TimeoutTable) -> None:
        self._table = table
        self._ring: list[Entry | None] = [None] * MOST  # by number % MOST
        self._running: dict[bytes, Entry] = {}  # by packed source: those here that run
        self._lifting: set[bytes] = set()  # lifted already, and the loop is still to tell of their end
        self.last = 0  # the number of the newest one; 0: there was none
        self.held = 0
        # Since the start, by reason and by state; also those that are not held here.
        self.begun = {name: 0 for name, times_out, _ in REASONS if times_out}
        self.ended = dict.fromkeys(STATES[1:], 0)
        self.watchers: set[Watcher] = set()

    # ---- what the loop tells ----------------------------------------------------------------------------------------

    def begin(self, told: TimedOut, looks: str | None, note: str | None, now: int, utc_now: int) -> None:
        """A time-out began.  `now` is CLOCK_MONOTONIC and `utc_now` UTC, both ns."""
        # One that ends sooner than the one that runs is counted, and what is told is the other one's start and end.
        start = told.start if now - told.start < NS else now
        self.last += 1
        entry = Entry(
            self.last, told.key, told.source, told.reason, utc_now - now + start, told.end - start, told.end,
            told.before, looks or spoke.UNKNOWN, told.first, note, told.proxied,
        )  # fmt: skip
        self.begun[told.reason] += 1
        if told.key in self._running:
            earlier = self._running.pop(told.key)
            self._end(earlier, *((EXPIRED, earlier.end) if earlier.end <= start else (RENEWED, start)), now, utc_now)
        self._enter(entry)
        self._running[told.key] = entry
        for watcher in self.watchers:
            watcher.tell(BEGUN, entry)

    def end(self, keys: Iterable[bytes], since: int, now: int, utc_now: int) -> None:
        """The loop has told that these are over.  `since`: the last number before this turn of the loop."""
        for key in keys:
            if key in self._lifting:
                self._lifting.discard(key)
                continue
            entry = self._running.get(key)
            if entry is None:  # more run than are held here
                self.ended[EXPIRED] += 1
            # Lifted or out of the table, and in it again in the same turn: this is the end of an earlier one.
            elif entry.number <= since or self._table.find(entry.source, now) is None:
                del self._running[key]
                state, at = (EXPIRED, entry.end) if entry.end <= now else (GAVE_WAY, now)
                entry.dropped = self._table.dropped(key)
                self._end(entry, state, at, now, utc_now)

    def lift(self, key: bytes, dropped: int | None, now: int, utc_now: int, *, told: bool = True) -> None:
        """A source was lifted; `dropped` of its time-out, None where none ran; `told`: the loop tells of it, too."""
        if told:
            self._lifting.add(key)
        entry = self._running.pop(key, None)
        if entry is not None:
            entry.dropped = dropped
            self._end(entry, LIFTED, now, now, utc_now)
        elif dropped is not None:
            self.ended[LIFTED] += 1

    def _end(self, entry: Entry, state: str, at: int, now: int, utc_now: int) -> None:
        entry.state = state
        entry.ended = utc_now - now + at
        self.ended[state] += 1
        for watcher in self.watchers:
            watcher.tell(ENDED, entry)

    def _enter(self, entry: Entry) -> None:
        place = entry.number % MOST
        gone = self._ring[place]
        self._ring[place] = entry
        if gone is None:
            self.held += 1
        elif self._running.get(gone.key) is gone:
            del self._running[gone.key]

    # ---- who asks ---------------------------------------------------------------------------------------------------

    @property
    def oldest(self) -> int:
        """The number of the oldest one held; where none is, the next to come."""
        return self.last - self.held + 1

    def get(self, number: int) -> Entry | None:
        """The entry with that number; None where it is not held."""
        entry = self._ring[number % MOST]
        return entry if entry is not None and entry.number == number else None

    def status(self) -> Mapping[str, int]:
        """How many are held, the most that can be, and the number of the newest one."""
        return {"held": self.held, "most": MOST, "begun": self.last}

    # ---- over a restart ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Sequence[Entry]:
        """What `save` takes, made in the loop's thread: oldest first."""
        cut = (self.last + 1) % MOST
        return [entry for entry in self._ring[cut:] + self._ring[:cut] if entry is not None]

    def restore(self, path: Path, now: int, utc_now: int) -> Mapping[bytes, str]:
        """Reads what was saved, once, into an empty history; returns the notes of those that run, by packed source.

        Whether one runs is asked of the table, which is restored before.  StateFileError: the history stays empty.
        """
        for entry in _load(path):
            self._enter(entry)
            self.last = entry.number
            self._running[entry.key] = entry  # a later one of the same source takes its place
        for entry in list(self._running.values()):
            self._resume(entry, now, utc_now)
        return {entry.key: entry.note for entry in self._running.values() if entry.note}

    def _resume(self, entry: Entry, now: int, utc_now: int) -> None:
        try:
            record = self._table.find(entry.source, now)
        except ValueError:  # a source of another --ipv6-prefix
            record = None
        if record is not None and record.before == entry.before:  # each time-out of a source counts that up
            entry.state, entry.ended, entry.dropped, entry.end = RUNNING, None, None, record.end
            return
        del self._running[entry.key]
        if entry.state == RUNNING:
            due = entry.at + entry.length
            entry.state, entry.ended = (EXPIRED, due) if due <= utc_now else (GAVE_WAY, utc_now)


def save(path: Path, entries: Sequence[Entry], utc_now: int) -> None:
    """Replaces the file by one that holds these; for the saving thread.  StateFileError: the old one stands."""
    # In pieces: one call for all would keep the GIL from the loop for milliseconds.
    pack = msgspec.json.Encoder().encode_lines
    FILE.save(path, [pack(entries[at : at + PIECE]) for at in range(0, len(entries), PIECE)], utc_now)


def _load(path: Path) -> Sequence[Entry]:
    saved = FILE.load(path)
    if saved is None:
        return []
    try:
        entries = msgspec.json.Decoder(Entry).decode_lines(saved[2])
    except msgspec.MsgspecError as error:
        raise FILE.bad(path, error) from error
    first = entries[0].number if entries else 0
    if any(entry.number != number for number, entry in enumerate(entries, first)):
        raise FILE.bad(path, ValueError("its numbers do not follow each other"))
    return entries[-MOST:]


@lru_cache(8192)  # a list of 50,000 has few different seconds, and each text costs as much as all else in its line
def utc_text(seconds: int) -> str:
    """A time since 1970 as 2026-01-31T12:00:00Z."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
