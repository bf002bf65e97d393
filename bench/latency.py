"""Requests a second and latency percentiles, by requests outstanding: encrypted pings beside what others answer.

redis-server and memcached give 64 bytes over TLS; the two servers in Python speak our protocol (bench/peers/).  They
show what the language and its loops cost, the C servers what is possible.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

from bench import kit
from bench.kit import Report, Row, Run, Side
from bench.servers import HONEST, Memcached, Ours, Python, Redis
from bench.userspace import CONNECTIONS, LOOPS, MICRO, peer, row_of, rows_beside_get

LEVELS = {1: "at least 1.5", 4: "", 16: "at least 0.4", 64: ""}  # outstanding on each connection, and what is wanted
REDIS, MEMCACHED = "redis GET, TLS", "memcached get, TLS"
TOLD = (1, 16)  # levels of which all peers stand in the table; the others are in the picture


def pings(report: Report) -> None:
    seconds, runs = (0.2, 1) if report.quick else (0.5, 5)
    with ExitStack() as stack:
        asked = _asked(report, stack)
        for outstanding, wanted in LEVELS.items():
            options: dict[str, Any] = {
                "connections": CONNECTIONS, "outstanding": outstanding, "block": HONEST, "sources": 64,
                "seconds": seconds, "warmup": 2_000,
            }  # fmt: skip
            sides: dict[str, Side] = {
                name: partial(kit.load, "request", protocol, port, **options, **more)
                for name, (protocol, port, more) in asked.items()
            }
            results = kit.compare(sides, runs, "server_ns")
            report.keep(str(outstanding), results)
            name = f"ping, {outstanding} outstanding"
            report.add(*rows_beside_get(name, results, wanted))
            if outstanding in TOLD:
                report.add(*_rows_beside_others(name, results))


def _asked(report: Report, stack: ExitStack) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """How each is asked: protocol, port, options."""
    ours = stack.enter_context(Ours())
    asked: dict[str, tuple[str, int, dict[str, Any]]] = {"ours": ("tt", ours.port, {"pid": ours.pid, "key": ours.key})}
    if redis := peer(report, stack, Redis):
        asked[REDIS] = ("tls", redis.port, {"pid": redis.pid, "request": redis.request, "reply": redis.reply})
    if memcached := peer(report, stack, Memcached):
        options = {"pid": memcached.pid, "request": memcached.request, "reply": memcached.reply}
        asked[MEMCACHED] = ("tls", memcached.port, options)
    for name in LOOPS:
        if python := peer(report, stack, partial(Python, name)):
            asked[name] = ("tt", python.port, {"pid": python.pid, "key": python.key})
    return asked


def _rows_beside_others(name: str, results: dict[str, list[Run]]) -> list[Row]:
    return [
        row
        for other in (MEMCACHED, *LOOPS)
        for row in (
            row_of(name, "us CPU", results, other, "server_ns", scale=MICRO),
            row_of(name, "/s", results, other, "rate", ours_over_peer=True),
        )
    ]
