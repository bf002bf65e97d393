"""What a report on time-outs counts: from the entries of the history to the figures that its page shows.

Entries are what the server's `bans.history` answers, one an object.  Time is an argument: seconds since 1970 (UTC).
A time-out is a repeat where its source had one before: in this window, or as far back as the server remembers.
Must not know where the entries come from, nor how a figure is shown.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Annotated, NamedTuple

import msgspec

from tt._core import REASONS

MOST_BARS = 95  # and one more where neither end of the window falls on the border of a bar
TOP = 20  # rows of a table
NETWORK_PREFIX = {4: 24, 6: 48}  # what one tenant usually has at a hoster or provider
MINUTE, HOUR, DAY = 60, 3600, 86400
# s that a bar may stand for: what divides a minute, an hour, a day; then days, weeks.  With at most 3.5 from one to the
# next, a window of 24 s or more gets 24 to 96 bars.
STEPS = (
    1, 2, 5, 10, 15, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 15 * MINUTE, 30 * MINUTE,
    HOUR, 2 * HOUR, 3 * HOUR, 4 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 7 * DAY, 14 * DAY, 28 * DAY,
)  # fmt: skip
YEAR_9999 = 253_370_764_800.0  # s: where Python's calendar ends
MONDAY = 4 * DAY  # 1970-01-05: where weeks are counted from


class Entry(msgspec.Struct):
    """One time-out, as the server's history has it."""

    number: int
    source: str
    reason: str
    at_s: Annotated[float, msgspec.Meta(ge=0, le=YEAR_9999)]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=YEAR_9999)]
    before: Annotated[int, msgspec.Meta(ge=0)] = 0
    looks: str = "unknown"
    first: str | None = None  # escaped, as in the log
    note: str | None = None
    proxied: bool = False
    state: str = "expired"
    dropped: Annotated[int, msgspec.Meta(ge=0)] | None = None  # connections closed while it ran; None: not known yet

    def __post_init__(self) -> None:
        """ValueError where the source is none."""
        ip_network(self.source, strict=False)


class Window(NamedTuple):
    """What the report is about."""

    begin: float
    end: float
    lost: int = 0  # time-outs of it, or from before it, that are no longer held


class Totals(NamedTuple):
    """The figures at a glance."""

    timeouts: int
    sources: int
    networks: int
    dropped: int
    unknown: int  # time-outs of which it is not known how many connections they dropped
    running: int
    longest: Entry | None
    repeats: int


class Bars(NamedTuple):
    """Time-outs over time: one Counter of reasons for each `step` seconds from `begin`."""

    begin: float
    step: int
    counts: Sequence[Counter[str]]

    @property
    def end(self) -> float:
        """Where the last bar ends."""
        return self.begin + self.step * len(self.counts)


class Network(NamedTuple):
    """A network with its time-outs."""

    network: str
    timeouts: int
    sources: int
    dropped: int
    first: float
    last: float


class Repeater(NamedTuple):
    """A source that was timed out more than once."""

    source: str
    timeouts: int  # that are known: with those before the window
    longest: float  # s
    dropped: int
    looks: str  # what it spoke most often
    last: float


class Figures(NamedTuple):
    """All that the page shows."""

    window: Window
    totals: Totals
    bars: Bars
    reasons: Sequence[tuple[str, int]]  # the most frequent first, as all lists here
    looks: Sequence[tuple[str, int]]
    networks: Sequence[Network]
    repeaters: Sequence[Repeater]
    latest: Sequence[Entry]  # the newest first
    first_held: float | None  # when the oldest entry began


def figures(entries: Iterable[Entry], window: Window, latest: int = 50) -> Figures:
    """Count the entries that began in the window."""
    inside = sorted((entry for entry in entries if entry.at_s >= window.begin), key=lambda entry: entry.at_s)
    by_network, by_source = _grouped(inside)
    networks = [_network(name, group) for name, group in by_network.items()]
    repeaters = [_repeater(source, group) for source, group in by_source.items()]
    longest = max(inside, key=lambda entry: entry.seconds, default=None)
    totals = Totals(
        timeouts=len(inside),
        sources=len(by_source),
        networks=len(by_network),
        dropped=_dropped(inside),
        unknown=sum(entry.dropped is None for entry in inside),
        running=sum(entry.state == "running" for entry in inside),
        longest=longest,
        # The first of each source is a repeat only where the server remembers one from before.
        repeats=sum(len(group) - (group[0].before == 0) for group in by_source.values()),
    )
    return Figures(
        window=window,
        totals=totals,
        bars=_bars(inside, window),
        reasons=in_order(Counter(entry.reason for entry in inside)),
        looks=Counter(entry.looks for entry in inside if entry.reason != "operator").most_common(),
        networks=sorted(networks, key=lambda one: (-one.timeouts, -one.dropped, one.first))[:TOP],
        repeaters=sorted(
            (one for one in repeaters if one.timeouts > 1), key=lambda one: (-one.timeouts, -one.longest, -one.last)
        )[:TOP],
        latest=inside[: -latest - 1 : -1],
        first_held=inside[0].at_s if inside else None,
    )


def in_order(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first; of equals the one that stands first among the server's reasons."""
    places = {name: place for place, (name, *_) in enumerate(REASONS)}
    return sorted(counts.items(), key=lambda item: (-item[1], places.get(item[0], len(places))))


def bar_step(seconds: float) -> int:
    """How many seconds a bar stands for in a window of that length."""
    return next((step for step in STEPS if seconds / step <= MOST_BARS), STEPS[-1])


def floor_to(time: float, step: int) -> int:
    """The last border of a bar before a time, in UTC; weeks begin on Monday."""
    offset = MONDAY if step % (7 * DAY) == 0 else 0
    return int((time - offset) // step) * step + offset


def _bars(entries: Sequence[Entry], window: Window) -> Bars:
    step = bar_step(window.end - window.begin)
    begin = floor_to(window.begin, step)
    counts: list[Counter[str]] = [Counter() for _ in range(int((window.end - begin) // step) + 1)]
    for entry in entries:
        # A clock that was put back may have left one that began after the end.
        counts[min(int((entry.at_s - begin) // step), len(counts) - 1)][entry.reason] += 1
    return Bars(begin, step, counts)


def _grouped(entries: Iterable[Entry]) -> tuple[dict[str, list[Entry]], dict[str, list[Entry]]]:
    by_network: defaultdict[str, list[Entry]] = defaultdict(list)
    by_source: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_source[entry.source].append(entry)
    for source, group in by_source.items():
        by_network[network_of(source)] += group
    return by_network, by_source


def network_of(source: str) -> str:
    """The /24 or /48 of a source; a source that is wider stands for itself."""
    network = ip_network(source, strict=False)
    prefix = NETWORK_PREFIX[network.version]
    return str(network.supernet(new_prefix=prefix) if network.prefixlen > prefix else network)


def _network(name: str, group: Sequence[Entry]) -> Network:
    times = [entry.at_s for entry in group]
    sources = len({entry.source for entry in group})
    return Network(name, len(group), sources, _dropped(group), min(times), max(times))


def _repeater(source: str, group: Sequence[Entry]) -> Repeater:
    known = max(len(group), max(entry.before for entry in group) + 1)
    ((looks, _),) = Counter(entry.looks for entry in group).most_common(1)
    longest = max(entry.seconds for entry in group)
    return Repeater(source, known, longest, _dropped(group), looks, group[-1].at_s)


def _dropped(entries: Iterable[Entry]) -> int:
    return sum(entry.dropped or 0 for entry in entries)
