"""Honest requests while others attack: connections of timed-out sources, scanners, forged HELLOs, slow ones.

Two generators share one processor, the server has the other.  The hostile one is an open loop (but for the slow ones):
it goes on at its rate whatever the server does, and gives up what stays unanswered for 50 ms.  The honest one has 50
connections from before, one request outstanding on each, and takes what processor time the other leaves; so the sides
differ in what an attack costs them, while the generator's own part is the same.
Each attack but the first comes from sources that the server has not met: who is timed out, is so by what it does.
"""

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

from bench import kit
from bench.kernel import pinned_map
from bench.kit import NotMeasuredError, Report, Row, Run, Side, column, ratios, show
from bench.servers import HONEST, HOSTILE, OFFENDERS, SOURCES, Haproxy, Ours
from bench.userspace import peer

FILTERED = "ours, listener filter"
LEAD = 1.0  # s, of a run that is not shorter, for which an attack is under way when the counting begins
NEW_BLOCKS = range(OFFENDERS, OFFENDERS + 60)  # of sources, each of 65,536
TLS_BEGIN = "\x16\x03"
FORGED_KEY = "5" * 64  # of no server: what is made for it does not authenticate


@dataclass(frozen=True)
class Attack:
    """What load.c is to do, to our server and to a TLS server."""

    words: str
    ours: tuple[str, str, Mapping[str, object]]  # work, protocol, options
    other: tuple[str, str, Mapping[str, object]]
    sources: int = SOURCES
    known: bool = False  # its sources are timed out before


def _attacks() -> Iterator[Attack]:
    fast = {"connections": 8192, "give_up": 50}
    flood = ("drop", "plain", fast | {"rate": 20_000})
    yield Attack("20,000 hostile/s", flood, flood, known=True)
    scan = ("junk", "plain", fast | {"rate": 5_000})
    yield Attack("5,000 scans/s of 4,096 scanners", scan, scan, sources=4096)
    hello = ("junk", "tt", fast | {"rate": 2_000, "key": FORGED_KEY})
    client_hello = ("junk", "tls", fast | {"rate": 2_000})
    yield Attack("2,000 forged HELLOs/s of 1,024 sources", hello, client_hello, sources=1024)
    slow = ("junk", "plain", {"connections": 4096})
    yield Attack(
        "4,096 slow ones", (*slow[:2], slow[2] | {"request": "TT"}), (*slow[:2], slow[2] | {"request": TLS_BEGIN})
    )


@dataclass(frozen=True)
class Honest:
    """How a server is asked by its honest clients; the hostile ones come to the same port."""

    protocol: str
    port: int
    options: dict[str, Any]
    new_blocks: Iterator[int] = field(default_factory=lambda: cycle(NEW_BLOCKS))

    def run(self, seconds: float, warmup: int = 1_000) -> Run:
        asked = self.options | {"connections": 50, "sources": 64, "seconds": seconds, "warmup": warmup}
        return kit.load("request", self.protocol, self.port, block=HONEST, **asked)

    def besieged(self, attack: Attack, seconds: float) -> Run:
        work, protocol, options = attack.ours if self.protocol == "tt" else attack.other
        block = HOSTILE if attack.known else next(self.new_blocks)
        with kit.loading(
            work, protocol, self.port, block=block, sources=attack.sources, seconds=600, **options
        ) as hostile:
            time.sleep(min(LEAD, seconds))
            run = dict(self.run(seconds, warmup=200))
            hostile.send_signal(signal.SIGTERM)
            said, _ = hostile.communicate(timeout=60)
        run["hostile_rate"] = json.loads(said)["rate"]
        return run


def siege(report: Report) -> None:
    seconds, runs = (0.3, 1) if report.quick else (1.2, 5)
    with ExitStack() as stack:
        honest = {name: _ours(stack, options) for name, options in _kinds(report, stack).items()}
        haproxy = peer(report, stack, Haproxy)
        if haproxy is not None:
            asked = {"pid": haproxy.pid, "request": haproxy.request, "reply": haproxy.reply()}
            honest["HAProxy"] = Honest("tls", haproxy.port2, asked)
        peace: dict[str, Side] = {name: partial(one.run, seconds) for name, one in honest.items()}
        _measure(report, "nobody hostile", peace, runs)
        for attack in _attacks():
            war: dict[str, Side] = {name: partial(one.besieged, attack, seconds) for name, one in honest.items()}
            _measure(report, attack.words, war, runs)


def _measure(report: Report, words: str, sides: dict[str, Side], runs: int) -> None:
    results = kit.alternate(sides, runs)
    report.keep(words, results)
    for name in sides:
        if name != "HAProxy":
            report.add(*_rows(f"honest requests, {words}, {name}", results[name], results.get("HAProxy", [])))


def _rows(name: str, ours: list[Run], other: list[Run]) -> list[Row]:
    rows = []
    for unit, key, scale in (("/s", "rate", 1), ("us p99", "p99_ns", 1000)):
        row = Row(name, unit, column(ours, key, scale), "HAProxy", column(other, key, scale))
        if other:
            row.ratio = ratios(ours, other, key) if key == "rate" else ratios(other, ours, key)
        rows.append(row)
    if "hostile_rate" in ours[0]:
        rows[0].note = f"the hostile came at {show(column(ours, 'hostile_rate'))} a second"
    return rows


def _ours(stack: ExitStack, options: tuple[object, ...]) -> Honest:
    ours = Ours(*options)
    stack.enter_context(ours)
    ours.time_out_hostile()
    return Honest("tt", ours.port, {"pid": ours.pid, "key": ours.key})


def _kinds(report: Report, stack: ExitStack) -> dict[str, tuple[object, ...]]:
    """Our server without and, where that can be had, with the listener filter: its options.

    Its table has room for who attacks: else the shortest time-out gives way to the next, and keeps nobody out.
    """
    room = ("--table-size", 2 * SOURCES)
    kinds: dict[str, tuple[object, ...]] = {"ours": room}
    try:
        _, path = stack.enter_context(pinned_map())
        kinds[FILTERED] = (*room, "-B", path)
    except NotMeasuredError as error:
        report.not_measured(f"the siege with the listener filter: {error}")
    return kinds
