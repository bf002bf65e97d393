"""What `tt top` knows: samples of a running server in, rates, charts, networks and the latest time-outs out.

A sample is the server's answer to `status` with the newest entries of its history of time-outs.  Counters become totals
of our own, which go on when the server starts anew; a rate is the difference of two totals by the time between them.
Rules: memory is bounded (WINDOW of samples, KEPT entries), and so is what is asked of a server with 50,000 time-outs.
Time is an argument.  Must not know a terminal, nor how the server is asked.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple

from tt.cli import report_figures
from tt.cli.report_figures import Entry

WINDOW = 600.0  # s of samples that are kept
MINUTE = 60.0  # s
RECENT = 600.0  # s: time-outs that count for their network
KEPT = 2000  # entries of the history
PER_SAMPLE = 500  # entries that one sample asks for; under a flood the rest is counted, not listed

network_of = lru_cache(KEPT)(report_figures.network_of)


class Sample(NamedTuple):
    """What a server answered at one time (monotonic s)."""

    at: float
    status: Mapping[str, Any]
    entries: Sequence[Entry]  # the newest of the history, oldest first; those asked for again have their state of now


class Point(NamedTuple):
    """The totals at one time (monotonic s), and whether it is known what happened since the point before."""

    at: float
    totals: Mapping[str, float]
    joined: bool


class Network(NamedTuple):
    """Time-outs of a network within RECENT."""

    name: str
    timeouts: int
    last: float  # s since 1970


def counts(status: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """All counters of a status by a name of their own; those of parts that its server does not have are left out."""
    yield "accepts", status["accepted"]
    yield "drops", status["closed"]["timed_out"]
    yield "time-outs", sum(status["timeouts"].values())
    yield "handshakes", status["handshakes"]
    yield "frames", status["frames"]
    if process := status["process"]:
        yield "cpu", process["cpu_seconds"]
    for reason, count in status["timeouts"].items():
        yield f"reason {reason}", count
    if catalog := status["catalog"]:
        yield "commits", catalog["commits"]
        yield "commit seconds", catalog["commit_seconds"]
    if gate := status["gate"]:
        yield "kernel drops", gate["filter"].get("dropped", 0)


def asks_after(begun: int, seen: int, shown: int | None) -> int:
    """The number behind which a sample asks for entries: those not seen yet, and those on the screen once more.

    `begun`: the number of the server's newest entry; `seen`: of the newest that is known here, 0 for none; `shown`: of
    the oldest on the screen, whose state may have changed.  At most PER_SAMPLE entries, the first time KEPT.
    """
    if not 0 < seen <= begun:  # the first time, or another history
        return max(0, begun - KEPT)
    known = seen if shown is None else min(seen, shown - 1)
    return max(0, known, begun - PER_SAMPLE)


class Model:
    """What the samples until now say; `status` is that of the newest."""

    def __init__(self) -> None:
        self.status: Mapping[str, Any] = {}
        self._points: list[Point] = []
        self._counters: dict[str, float] = {}  # as the newest status has them
        self._entries: dict[int, Entry] = {}  # by number, which grows
        self._broken = False

    def add(self, sample: Sample) -> None:
        """Take the next sample."""
        restarted = bool(self.status) and _is_another(self.status, sample.status)
        before = {} if restarted else self._counters
        totals = dict(self._points[-1].totals) if self._points else {}
        self._counters = dict(counts(sample.status))
        for name, count in self._counters.items():
            # At the first sample there is nothing to compare with: what was counted until then is in no rate.
            since = count - before.get(name, 0) if self._points else 0
            totals[name] = totals.get(name, 0) + max(since, 0)
        self._points.append(Point(sample.at, totals, joined=not (restarted or self._broken)))
        del self._points[: bisect_left(self._points, sample.at - WINDOW, key=_at)]
        self.status = sample.status
        self._broken = False
        self._take(sample.entries)

    def miss(self) -> None:
        """A sample could not be had: until the next one nothing is known."""
        self._broken = True

    def _take(self, entries: Sequence[Entry]) -> None:
        begun = self.status["history"]["begun"]
        if self._entries and begun < self.seen:  # another history: its numbers begin anew
            self._entries.clear()
        for entry in entries:
            self._entries[entry.number] = entry
        while len(self._entries) > KEPT:
            del self._entries[next(iter(self._entries))]

    # ---- rates ------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """When the newest sample was taken."""
        return self._points[-1].at

    def growth(self, name: str, seconds: float) -> tuple[float, float] | None:
        """How much was counted in the last so many seconds, but since the sample before the last one at least; and in
        how many seconds that was.  None: there is but one sample.
        """
        if len(self._points) < 2:
            return None
        last = self._points[-1]
        place = bisect_right(self._points, last.at - seconds, key=_at) - 1
        first = self._points[min(max(place, 0), len(self._points) - 2)]
        return last.totals.get(name, 0) - first.totals.get(name, 0), last.at - first.at

    def rate(self, name: str, seconds: float = 0.0) -> float | None:
        """Per second over the last so many seconds, or between the last two samples; None: not known."""
        growth = self.growth(name, seconds)
        if growth is None or (not seconds and not self._points[-1].joined):
            return None
        return growth[0] / growth[1]

    def mean(self, name: str, each: str) -> float | None:
        """How much of `name` for one of `each` in the last minute; None where there was none."""
        much, many = self.growth(name, MINUTE), self.growth(each, MINUTE)
        return much[0] / many[0] if much and many and many[0] else None

    def chart(self, name: str, columns: int, step: float) -> list[float | None]:
        """Rates per second of `columns` times of `step` seconds, the last one not over yet; None: not known.

        They begin at multiples of `step`, so that the picture does not change but by moving on.
        """
        end = self.now // step * step
        borders = [end - step * number for number in range(columns - 1, -1, -1)]
        rates: list[float | None] = []
        for begin in borders:
            start, until = max(begin, self._points[0].at), min(begin + step, self.now)
            one, two = self._total(name, start), self._total(name, until)
            # The first moment of a new column has no length yet: nothing to divide by.
            known = one is not None and two is not None and until > start
            rates.append((two - one) / (until - start) if known else None)  # type: ignore[operator]
        return rates

    def _total(self, name: str, at: float) -> float | None:
        """Between two points as if all had happened evenly; None before the first, and where a sample is missing."""
        place = bisect_left(self._points, at, key=_at)
        if place == len(self._points):
            return None
        after = self._points[place]
        if after.at == at:
            return after.totals.get(name, 0)
        if place == 0 or not after.joined:
            return None
        before = self._points[place - 1]
        one, two = before.totals.get(name, 0), after.totals.get(name, 0)
        return one + (two - one) * (at - before.at) / (after.at - before.at)

    # ---- time-outs --------------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """The number of the newest entry; 0 for none."""
        return next(reversed(self._entries), 0)

    def reasons(self, now: float) -> list[tuple[str, int, int]]:
        """Each reason that timed out somebody: its name, time-outs in the minute before `now` (s since 1970), and since
        the server's start.
        """
        # What is counted lacks the time before the first sample, what is listed may lack some of a flood.
        recent = Counter(entry.reason for entry in self._entries.values() if entry.at_s > now - MINUTE)
        rows = []
        for reason, count in self.status["timeouts"].items():
            growth = self.growth(f"reason {reason}", MINUTE)
            if count:
                rows.append((reason, max(recent[reason], int(growth[0]) if growth else 0), count))
        return sorted(rows, key=lambda row: (-row[1], -row[2]))

    def networks(self, now: float) -> list[Network]:
        """The networks with most time-outs within RECENT of `now` (s since 1970), of the entries that are kept."""
        times: Counter[str] = Counter()
        last: dict[str, float] = {}
        for entry in self._entries.values():
            if entry.at_s > now - RECENT:
                name = network_of(entry.source)
                times[name] += 1
                last[name] = entry.at_s
        return sorted((Network(name, many, last[name]) for name, many in times.items()), key=lambda n: (-n[1], -n[2]))

    def latest(self, words: str = "") -> list[Entry]:
        """The newest entries first, of these the ones that have `words` in their source, network, reason or text."""
        wanted = words.casefold()
        return [entry for entry in reversed(self._entries.values()) if not wanted or wanted in _text(entry)]

    def within(self, network: IPv4Network | IPv6Network) -> int:
        """How many sources in this network are timed out, of the entries that are kept."""
        running = {entry.source for entry in self._entries.values() if entry.state == "running"}
        parsed = [ip_network(source, strict=False) for source in running]
        return sum(own.version == network.version and network.overlaps(own) for own in parsed)


def _is_another(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the server was started anew in between; in a container each has the same process id."""
    return bool(before["pid"] != after["pid"] or before["uptime_s"] > after["uptime_s"])


def _at(point: Point) -> float:
    return point.at


def _text(entry: Entry) -> str:
    words = (entry.source, network_of(entry.source), entry.reason, entry.looks, entry.first, entry.note, entry.state)
    return " ".join(word for word in words if word).casefold()
