"""What needs no right: connections dropped, requests answered, handshakes, memory; each beside a peer.

The server's CPU time a unit is the figure that counts, since it does not depend on how fast the generator is; rates
stand beside it where the server, and not the generator, was the limit.
"""

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from bench import kit
from bench.kit import NotMeasuredError, Report, Row, Run, Side, column, ratios
from bench.servers import HONEST, HOSTILE, SOURCES, Bare, Haproxy, Nginx, Ours, Process, Python

CONNECTIONS = 50
LOOPS = ("asyncio", "uvloop")
MICRO = 1000.0  # ns
P = TypeVar("P", bound=Process)


def peer(report: Report, stack: ExitStack, make: Callable[[], P]) -> P | None:
    """That peer, running until the stack ends; None, and said, where it cannot be had."""
    try:
        server = make()
    except NotMeasuredError as error:
        report.not_measured(error)
        return None
    stack.enter_context(server)
    return server


def row_of(  # noqa: PLR0913 - the columns of the table
    name: str,
    unit: str,
    results: dict[str, list[Run]],
    peer_name: str,
    key: str,
    *,
    scale: float = 1,
    ours_over_peer: bool = False,
    wanted: str = "",
) -> Row:
    """A figure of "ours" beside that of a peer, which may not be there."""
    ours, other = results["ours"], results.get(peer_name, [])
    row = Row(name, unit, column(ours, key, scale), peer_name, column(other, key, scale), wanted=wanted)
    if other:
        row.ratio = ratios(ours, other, key) if ours_over_peer else ratios(other, ours, key)
    return row


def rows_beside_get(name: str, results: dict[str, list[Run]], wanted: str) -> list[Row]:
    """What is told of answers beside redis-server's to `GET`; `wanted` is for CPU time and rate."""
    get = "redis GET, TLS"
    return [
        row_of(name, "us CPU", results, get, "server_ns", scale=MICRO, wanted=wanted),
        row_of(name, "/s", results, get, "rate", ours_over_peer=True, wanted=wanted),
        row_of(name, "us p99", results, get, "p99_ns", scale=MICRO),
    ]


# ---- accept and drop ------------------------------------------------------------------------------------------------


def drops(report: Report) -> None:
    """CPU time of a connection that a timed-out source makes, all sources in turn, 64 connections at a time."""
    count, runs = (5_000, 1) if report.quick else (30_000, 7)

    def dropped(server: Process) -> Run:
        options = {"connections": 64, "block": HOSTILE, "sources": SOURCES, "count": count, "warmup": count // 20}
        result = kit.load("drop", "plain", server.port, pid=server.pid, **options)
        if result["resets"] + result["ends"] < count:
            raise RuntimeError(f"{server.name} left connections open")
        return result

    with ExitStack() as stack:
        ours, bare = stack.enter_context(Ours()), stack.enter_context(Bare())
        ours.time_out_hostile()
        sides: dict[str, Side] = {"ours": partial(dropped, ours), "bare C": partial(dropped, bare)}
        if haproxy := peer(report, stack, Haproxy):
            sides["HAProxy"] = partial(dropped, haproxy)
        for loop in LOOPS:
            if python := peer(report, stack, partial(Python, loop)):
                python.time_out_hostile()
                sides[loop] = partial(dropped, python)
        results = kit.compare(sides, runs, "server_ns")
    report.keep("drops", results)
    name = "accept and drop, 65,536 sources timed out"
    report.add(
        row_of(name, "us CPU", results, "bare C", "server_ns", scale=MICRO, ours_over_peer=True, wanted="at most 1.05"),
        row_of(name, "us CPU", results, "HAProxy", "server_ns", scale=MICRO),
        row_of(name, "connections/s", results, "HAProxy", "rate", ours_over_peer=True),
        *(row_of(name, "us CPU", results, loop, "server_ns", scale=MICRO) for loop in LOOPS),
    )


# ---- handshakes ------------------------------------------------------------------------------------------------------


def handshakes(report: Report) -> None:
    """Full handshakes, a new connection each, from a source each, so that no budget of ours comes in."""
    count, runs = (500, 3) if report.quick else (2_000, 7)
    options: dict[str, Any] = {
        "connections": 32,
        "block": HONEST,
        "sources": SOURCES,
        "count": count,
        "warmup": count // 20,
    }
    with ExitStack() as stack:
        ours = stack.enter_context(Ours())
        greet = partial(kit.load, "handshake", **options)
        sides: dict[str, Side] = {"ours": partial(greet, "tt", ours.port, pid=ours.pid, key=ours.key)}
        if nginx := peer(report, stack, Nginx):
            sides["nginx, TLS"] = partial(greet, "tls", nginx.port, pid=nginx.pid)
        for loop in LOOPS:
            if python := peer(report, stack, partial(Python, loop)):
                sides[loop] = partial(greet, "tt", python.port, pid=python.pid, key=python.key)
        results = kit.compare(sides, runs, "server_ns")
    report.keep("handshakes", results)
    rate = row_of("full handshake", "/s", results, "nginx, TLS", "rate", ours_over_peer=True)
    for side, of_side in results.items():
        if max(column(of_side, "server_busy")) < 0.9:
            rate.note += f"{side}: not saturated; "
    report.add(
        row_of("full handshake", "us CPU", results, "nginx, TLS", "server_ns", scale=MICRO, wanted="at least 3"),
        rate,
        *(row_of("full handshake", "us CPU", results, loop, "server_ns", scale=MICRO) for loop in LOOPS),
    )


# ---- the table ------------------------------------------------------------------------------------------------------


def table(report: Report) -> None:
    """The time-out table alone (bench/lookup.pyx): the same 512 sources, which a cache holds, in a small and in a large
    table; then what the caches make of all sources in turn.
    """
    path = kit.program("lookup.so")
    spec = importlib.util.spec_from_file_location("lookup", path)
    if spec is None or spec.loader is None:
        raise NotMeasuredError(f"{path.relative_to(kit.ROOT)} cannot be loaded")
    lookup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lookup)
    few, many, hot = 1 << 10, 1 << 20, 512
    count, runs = (200_000, 3) if report.quick else (2_000_000, 9)

    def looked_up(sources: int, among: int) -> Run:
        return {"ns": lookup.look_ups(sources, among, count)}

    small, large = "in 1,024 sources", "in 1,048,576 sources"
    results = kit.compare(
        {large: lambda: looked_up(many, hot), small: lambda: looked_up(few, hot)}, runs, "ns"
    )  # fmt: skip
    cold = [looked_up(many, many)["ns"] for _ in range(runs)]
    row = Row(f"look-up, {large}", "ns", column(results[large], "ns"), small, column(results[small], "ns"))
    row.ratio, row.wanted = ratios(results[large], results[small], "ns"), "at most 2"
    report.add(
        row,
        Row(f"look-up of any, {large}", "ns", cold),
        Row("slot with its key", "bytes", [lookup.slot_bytes()], wanted="at most 64"),
    )
