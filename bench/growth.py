"""What more of it costs: memory of idle connections, answers among many connections, drops among many time-outs.

Rules: the many are as many as this machine's limit of descriptors lets one process have, at most 100,000.  A side is
asked at each size in one run, so that the sizes can be compared as the sides can.
"""

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import kit
from bench.kit import Report, Row, Run, Side, column, ratios
from bench.latency import REDIS
from bench.servers import HONEST, HOSTILE, IDLE, SOURCES, Haproxy, Memcached, Nginx, Ours, Process, Python, Redis
from bench.userspace import MICRO, peer, row_of
from tt import timeouts as timeouts_file
from tt._core import TimeoutTable

HOUR = 3600 * 10**9  # ns
FEW = 50  # connections: what these cost alone is no cost of a connection
NOT_PROTOCOL = 1  # the number of a reason, whichever


def most_connections() -> int:
    """A server's own files and the generator's come to it."""
    return min(100_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 512)


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(report: Report) -> None:
    """Private memory of a process for each idle connection; the kernel's part is not in it."""
    many = 1_000 if report.quick else 5_000
    before = _bytes_each(Ours(), FEW, 5_000, _silent)  # fewer would say more of pages than of connections
    report.add(Row("idle connection before its HELLO", "bytes", [before], wanted="at most 1024"))
    ours = _bytes_each(Ours(), FEW, many, _greeted)
    name = "idle connection after its handshake"
    report.add(Row(name, "bytes", [ours], wanted="at most 8192"))
    kinds: dict[str, Callable[[], Process]] = {
        "redis, TLS": Redis, "memcached, TLS": Memcached, "nginx, TLS": Nginx, "HAProxy, TLS": Haproxy,
        "asyncio": Python, "uvloop": partial(Python, "uvloop"),
    }  # fmt: skip
    for other, make in kinds.items():
        with ExitStack() as stack:
            row = Row(name, "bytes", [ours], other)
            if server := peer(report, stack, make):
                row.peer = [_held(server, FEW, many, _greeted)]
                row.ratio = [row.peer[0] / ours]
            report.add(row)
    if not report.quick:
        most = most_connections()
        report.add(Row(f"{name}, {most:,} of them", "bytes", [_bytes_each(Ours(), FEW, most - FEW, _greeted)]))


Holding = Callable[[Process, int, int], AbstractContextManager[object]]


def _bytes_each(server: Ours, few: int, many: int, holding: Holding) -> float:
    with server:
        return _held(server, few, many, holding)


def _held(server: Process, few: int, many: int, holding: Holding) -> float:
    with holding(server, 0, few):
        before = _private_bytes(server.pid)
        with holding(server, few, many):
            return (_private_bytes(server.pid) - before) / many


@contextmanager
def _silent(server: Process, first: int, count: int) -> Iterator[None]:
    """Connections that say nothing; as many as are accepted within the time in which they must."""
    with ExitStack() as stack:
        for number in range(first, first + count):
            address = (kit.source(IDLE, number), 0)
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10, address))
        time.sleep(0.2)  # the last of them are accepted
        yield


def _greeted(server: Process, _first: int, count: int) -> AbstractContextManager[Side]:
    """Connections with their handshake done; `turns` would ask on them, but nobody does."""
    options: dict[str, Any] = {"connections": count, "block": IDLE, "sources": SOURCES}
    if isinstance(server, Ours | Python):
        return kit.turns("tt", server.port, key=server.key, **options)
    port = server.port2 if isinstance(server, Haproxy) else server.port
    return kit.turns("tls", port, request="-", reply=1, **options)


def _private_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Private_Dirty"].split()[0]) * 1024


# ---- connections ----------------------------------------------------------------------------------------------------


def connections(report: Report) -> None:
    """Pings on few connections and on many, one outstanding on each, beside redis-server."""
    seconds, runs = (0.3, 1) if report.quick else (0.7, 5)
    most = 1_000 if report.quick else min(20_000, most_connections())
    levels = [*(level for level in (10, 100, 1_000, 10_000) if level < most), most]
    with ExitStack() as stack:
        ours = stack.enter_context(Ours())
        redis = peer(report, stack, Redis)
        by_level = {}
        for level in levels:
            options: dict[str, Any] = {
                "connections": level, "block": HONEST, "sources": SOURCES, "seconds": seconds, "warmup": level * 2
            }  # fmt: skip
            with ExitStack() as turns:
                side = kit.turns("tt", ours.port, pid=ours.pid, key=ours.key, **options)
                sides: dict[str, Side] = {"ours": turns.enter_context(side)}
                if redis is not None:
                    asked: dict[str, Any] = {"pid": redis.pid, "request": redis.request, "reply": redis.reply}
                    sides[REDIS] = turns.enter_context(kit.turns("tls", redis.port, **asked, **options))
                by_level[level] = kit.alternate(sides, runs)
            report.keep(str(level), by_level[level])
            name = f"ping on {level:,} connections"
            report.add(
                row_of(name, "us CPU", by_level[level], REDIS, "server_ns", scale=MICRO),
                row_of(name, "/s", by_level[level], REDIS, "rate", ours_over_peer=True),
            )
    report.add(_grown(f"ping on {most:,} connections", by_level[most]["ours"], "10 connections", by_level[10]["ours"]))


def _grown(name: str, large: list[Run], small_name: str, small: list[Run], wanted: str = "") -> Row:
    row = Row(name, "us CPU", column(large, "server_ns", MICRO), small_name, column(small, "server_ns", MICRO))
    row.ratio, row.wanted = ratios(large, small, "server_ns"), wanted
    return row


# ---- time-outs ------------------------------------------------------------------------------------------------------


class TimedOut(Ours):
    """Our server, started with so many sources of HOSTILE timed out."""

    def __init__(self, sources: int, *options: object) -> None:
        super().__init__("--table-size", max(1024, sources), *options)
        self.sources = sources

    def prepare(self) -> None:
        super().prepare()
        now = time.monotonic_ns()
        table = TimeoutTable(max(1024, self.sources), now=now)
        for number in range(self.sources):
            table.add(kit.source(HOSTILE, number), NOT_PROTOCOL, HOUR, now)
        timeouts_file.save(self.folder / "timeouts", table.dump(now), time.time_ns())


def timeouts(report: Report) -> None:
    """CPU time of a connection from a timed-out source, among few of them and many, beside HAProxy's list."""
    sizes = (1_000, 10_000) if report.quick else (1_000, 10_000, 100_000, 1_000_000)
    count, runs = (5_000, 3) if report.quick else (15_000, 5)
    by_size: dict[int, dict[str, list[Run]]] = {}
    for size in sizes:
        with ExitStack() as stack:
            sides: dict[str, Side] = {"ours": partial(_dropped, stack.enter_context(TimedOut(size)), size, count)}
            if haproxy := peer(report, stack, partial(Haproxy, size)):
                sides["HAProxy"] = partial(_dropped, haproxy, size, count)
            by_size[size] = kit.alternate(sides, runs)
        report.keep(str(size), by_size[size])
        name = f"accept and drop, {size:,} sources timed out"
        report.add(row_of(name, "us CPU", by_size[size], "HAProxy", "server_ns", scale=MICRO))
    large, small = sizes[-1], sizes[0]
    name = f"accept and drop, {large:,} sources timed out"
    report.add(_grown(name, by_size[large]["ours"], f"{small:,} sources", by_size[small]["ours"]))


def _dropped(server: Process, sources: int, count: int) -> Run:
    options = {"connections": 64, "block": HOSTILE, "sources": sources, "count": count, "warmup": count // 20}
    run = kit.load("drop", "plain", server.port, pid=server.pid, **options)
    if run["resets"] + run["ends"] < count:
        raise RuntimeError(f"{server.name} left connections open")
    return run
