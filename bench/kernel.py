"""What the kernel does for us: how soon a verdict is in its map, what it drops, and what that costs the others.

All of it needs root, and runs in namespaces of its own (`namespaces`).
"""

import ctypes
import json
import shutil
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bench import flood, kit
from bench.kit import NotMeasuredError, Report, Row, column
from bench.servers import HOSTILE, OFFENDERS, SOURCES, Ours, free_port
from tt import bpf_load
from tt._core import TimedOut, TimeoutTable
from tt.bpf import Map
from tt.kernel_gate import KernelGate

MICRO = 1000.0  # ns
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
HOUR = 3600 * 10**9  # ns

_pins: Path | None = None


@contextmanager
def namespaces(folder: Path) -> Iterator[None]:
    """Put this process, and what it starts, into network and mount namespaces of its own, with a BPF file system."""
    global _pins  # noqa: PLW0603 - one process, one namespace
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare(2)")
    kit.output_of("mount", "--make-rprivate", "/")
    kit.output_of("ip", "link", "set", "lo", "up")
    kit.output_of("ip", "route", "add", "local", "100.64.0.0/10", "dev", "lo")  # every address of kit.source() is ours
    _pins = folder / "bpf"
    _pins.mkdir()
    kit.output_of("mount", "-t", "bpf", "bpf", _pins)
    try:
        yield
    finally:
        kit.output_of("umount", _pins)


@contextmanager
def pinned_map(entries: int = 2 * SOURCES) -> Iterator[tuple[Map, Path]]:
    """A map like the documented one (hash, 4-byte keys and values), but larger, pinned meanwhile."""
    if _pins is None:
        raise NotMeasuredError("the kernel's part needs root")
    path = _pins / "tapetrack_block_map"
    one = bpf_load.create_map("hash", (4, 4), entries, path.name)
    bpf_load.pin_map(one, str(path))
    try:
        yield one, path
    finally:
        path.unlink()
        one.close()


def time_out_flood(block_map: Map) -> None:
    """Enter every source of the flood's network, for an hour."""
    end = struct.pack("=I", (time.monotonic_ns() + HOUR) // 10**9)
    network = struct.unpack("!I", socket.inet_aton(flood.NETWORK))[0]
    sources = [struct.pack("!I", network + number) for number in range(SOURCES)]
    done, number = block_map.update_batch(sources, [end] * len(sources))
    if done < SOURCES:
        raise block_map.error(number)


# ---- from the verdict to the map ------------------------------------------------------------------------------------


def verdicts(report: Report) -> None:
    """First hostile byte sent until its source is in the map, 1,000 new offenders a second (bench/offend.c)."""
    count, runs = (2_000, 1) if report.quick else (8_000, 3)
    results = []
    with pinned_map() as (_, path), Ours("-B", path) as ours:
        for number in range(runs):
            first = kit.source(OFFENDERS + number)
            words = (kit.program("offend"), "127.0.0.1", ours.port, path, count, 1000, first)
            results.append(json.loads(kit.output_of(*words, cpu=kit.LOAD_CPU)))
    report.keep("verdicts", results)
    name = "first hostile byte to kernel map"
    report.add(
        Row(f"{name}, p50", "us", column(results, "p50_ns", MICRO), wanted="at most 100"),
        Row(f"{name}, p99", "us", column(results, "p99_ns", MICRO), wanted="at most 1000"),
    )


def additions(report: Report) -> None:
    """Time-outs that the gate writes to the map a second: one a turn of the loop, and 1,000 a turn."""
    many = 1_000
    turns = 20 if report.quick else 60
    rates: dict[int, list[float]] = {1: [], many: []}
    for _ in range(3 if report.quick else 9):
        for size, of_size in rates.items():
            with pinned_map() as (_, path):
                gate = KernelGate.open([path], 64)
                of_size.append(_additions_per_second(gate, size, turns * many // size))
                gate.close()
    one_a_process = _bpftool_per_second(report)
    for size, values in rates.items():
        row = Row(f"time-outs added to the map, {size:,} a turn", "/s", values, "bpftool, a process each")
        if one_a_process:
            row.peer = [one_a_process]
            row.ratio = [value / one_a_process for value in values]
        report.add(row)


def _additions_per_second(gate: KernelGate, size: int, turns: int) -> float:
    now = time.monotonic_ns()
    table = TimeoutTable(1024, now=now)
    keys = [struct.pack("!I", (10 << 24) + number) for number in range(size * turns)]
    records = [
        TimedOut(socket.inet_ntoa(key), key, "not_protocol", now, now + HOUR, 0, exempt=False, first=b"")
        for key in keys
    ]
    begun = time.perf_counter()
    for at in range(0, len(records), size):
        gate.turn(records[at : at + size], (), table)
    return len(records) / (time.perf_counter() - begun)


def _bpftool_per_second(report: Report) -> float | None:
    """As scripts do it: a process an address."""
    if shutil.which("bpftool") is None:
        report.not_measured("bpftool is not installed: run: make bench-deps")
        return None
    count = 50
    with pinned_map() as (_, path):
        begun = time.perf_counter()
        for number in range(count):
            key = ("10", "0", "0", str(number))
            kit.output_of("bpftool", "map", "update", "pinned", path, "key", *key, "value", "1", "0", "0", "0")
        return count / (time.perf_counter() - begun)


# ---- what is dropped ------------------------------------------------------------------------------------------------


def packets(report: Report) -> None:
    """Attempts of 65,536 timed-out sources that one processor turns away a second, their making included on both sides:
    SYNs at the listener filter (bench/flood.py), and whole connections that our loop accepts and drops.
    """
    in_kernel, alone = _dropped_by_filter(report)
    in_user_space = _dropped_in_user_space(report)
    report.keep("packets", {"filter_ns": in_kernel, "generator_alone_ns": alone, "accept_and_drop_ns": in_user_space})
    row = Row("dropped by the listener filter", "/s and core", [1e9 / ns for ns in in_kernel], "accept and drop")
    row.peer = [1e9 / ns for ns in in_user_space]
    row.ratio = [user / kernel for user, kernel in zip(in_user_space, in_kernel, strict=True)]
    row.wanted = "at least 25"
    row.note = f"the generator's part is {statistics.median(alone):.0f} of {statistics.median(in_kernel):.0f} ns"
    report.add(row)


def _runs(report: Report) -> int:
    return 3 if report.quick else 7


def _dropped_by_filter(report: Report) -> tuple[list[float], list[float]]:
    """CPU time of a SYN, ns: with the generator, and of the generator alone."""
    count = 200_000 if report.quick else 500_000
    with pinned_map() as (block_map, path):
        time_out_flood(block_map)
        with closing(flood.Flood()) as syns, kit.on_load_cpu():
            port = free_port()
            with Ours("-B", path, "--listen", f"{flood.ADDRESS}:{port}") as ours:
                before = filter_drops(ours)
                in_kernel = [syns.ns_per_packet(port, count) for _ in range(_runs(report))]
                dropped = filter_drops(ours) - before
            if dropped < count * len(in_kernel):
                raise RuntimeError(f"only {dropped} of {count * len(in_kernel)} SYNs met the filter")
            alone = [syns.ns_per_packet(port, count, flood.DROP) for _ in range(_runs(report))]
    return in_kernel, alone


def filter_drops(ours: Ours) -> int:
    """SYNs that its listener filter has dropped, as `tt status` says."""
    status = json.loads(kit.output_of(kit.ROOT / ".venv/bin/tt", "status", "--json", "--data", ours.folder))
    return int(status["gate"]["filter"]["dropped"])


def _dropped_in_user_space(report: Report) -> list[float]:
    """CPU time of a connection, ns: of the generator and the server, on one processor."""
    count = 5_000 if report.quick else 30_000
    ours = Ours()
    ours.cpu = kit.LOAD_CPU
    with ours:
        ours.time_out_hostile()
        return [accept_and_drop(ours, count) for _ in range(_runs(report))]


def accept_and_drop(ours: Ours, count: int) -> float:
    """CPU time of a connection from a timed-out source, ns: the generator's and the server's."""
    options = {"connections": 64, "block": HOSTILE, "sources": SOURCES, "count": count, "warmup": count // 20}
    run = kit.load("drop", "plain", ours.port, pid=ours.pid, **options)
    return run["generator_ns"] + run["server_ns"]


# ---- what the others pay --------------------------------------------------------------------------------------------


def segments(report: Report) -> None:
    """What the inherited filter costs each data segment of an accepted connection: one byte a segment over loopback,
    with the filter put on and taken off by turns.  Sending runs the receiver's filter, so its time is the figure.
    """
    count, rounds = (5_000, 7) if report.quick else (20_000, 41)
    with (
        pinned_map() as (block_map, _),
        closing(bpf_load.load_listener_filter({4: block_map}, 64)) as listener_filter,
        kit.on_load_cpu(),
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
        listener.accept()[0] as receiver,
    ):
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        without, with_ = [], []
        for _ in range(rounds):
            without.append(_ns_per_segment(sender, receiver, count))
            bpf_load.attach(listener_filter, receiver.fileno())
            with_.append(_ns_per_segment(sender, receiver, count))
            bpf_load.detach(receiver.fileno())
    report.keep("segments", {"without_ns": without, "with_ns": with_})
    row = Row("data segment, with the inherited filter", "ns", with_, "without", without)
    row.ratio = [a / b for a, b in zip(with_, without, strict=True)]
    cost = statistics.median(a - b for a, b in zip(with_, without, strict=True))
    row.note = f"median of the differences {cost:+.0f} ns"
    report.add(row)


def _ns_per_segment(sender: socket.socket, receiver: socket.socket, count: int) -> float:
    at_once = 50
    begun = time.thread_time_ns()
    for _ in range(count // at_once):
        for _ in range(at_once):
            sender.send(b"x")
        left = at_once
        while left:
            left -= len(receiver.recv(left))
    return (time.thread_time_ns() - begun) / count
