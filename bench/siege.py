"""Honest requests while 20,000 connections a second arrive from timed-out sources.

Two generators share one processor, the server has the other.  The hostile one is an open loop: it goes on at its rate
whatever the server does, and gives up a SYN that stays unanswered after 50 ms.  The honest one has 50 connections from
before, one request outstanding on each, and takes what processor time the other leaves; so the sides differ in what an
attack costs them, while the generator's own part is the same.
"""

import json
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import kit
from bench.kernel import pinned_map
from bench.kit import NotMeasuredError, Report, Row, Run, column, ratios, show
from bench.servers import HONEST, HOSTILE, SOURCES, Haproxy, Ours
from bench.userspace import peer

HOSTILE_RATE = 20_000  # a second
FILTERED = "ours, listener filter"


@dataclass(frozen=True)
class Honest:
    """How a server is asked by its honest clients; the hostile ones come to the same port."""

    protocol: str
    port: int
    options: dict[str, Any]

    def run(self, seconds: int) -> Run:
        asked = self.options | {"connections": 50, "sources": 64, "seconds": seconds, "warmup": 5_000}
        return kit.load("request", self.protocol, self.port, block=HONEST, **asked)

    def besieged(self, seconds: int) -> Run:
        words = [
            f"rate={HOSTILE_RATE}", "connections=8192", "give_up=50", f"seconds={seconds + 3}",
            f"from={kit.source(HOSTILE)}", f"sources={SOURCES}",
        ]  # fmt: skip
        address = ("127.0.0.1", self.port)
        line = kit.command(kit.program("load"), "drop", "plain", *address, *words, cpu=kit.LOAD_CPU)
        hostile = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)  # noqa: S603
        try:
            time.sleep(1)  # the attack is under way when the counting begins, and goes on when it ends
            run = dict(self.run(seconds))
            said, _ = hostile.communicate(timeout=60)
            if hostile.returncode:
                raise RuntimeError("the hostile generator failed: see above")
        finally:
            hostile.kill()
            hostile.wait()
        run["hostile_rate"] = json.loads(said)["rate"]
        return run


def siege(report: Report) -> None:
    seconds, runs = (2, 2) if report.quick else (5, 5)
    with ExitStack() as stack:
        honest = {name: _ours(stack, options) for name, options in _kinds(report, stack).items()}
        haproxy = peer(report, stack, Haproxy)
        if haproxy is not None:
            asked = {"pid": haproxy.pid, "request": haproxy.request, "reply": haproxy.reply()}
            honest["HAProxy"] = Honest("tls", haproxy.port2, asked)
        peace = kit.alternate({name: partial(one.run, seconds) for name, one in honest.items()}, runs)
        war = kit.alternate({name: partial(one.besieged, seconds) for name, one in honest.items()}, runs)
    report.details["siege"] = {"nobody hostile": peace, "20,000 hostile a second": war}
    for words, results in (("nobody hostile", peace), ("20,000 hostile/s", war)):
        for name in honest:
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
    """Our server without and, where that can be had, with the listener filter: its options."""
    kinds: dict[str, tuple[object, ...]] = {"ours": ()}
    try:
        _, path = stack.enter_context(pinned_map())
        kinds[FILTERED] = ("-B", path)
    except NotMeasuredError as error:
        report.missing.append(f"the siege with the listener filter: {error}")
    return kinds
