"""Honest pings while 400,000 SYNs a second from timed-out sources load the server's processor.

SYNs alone: no handshake is completed, so no server, and no reject rule of its own, ever sees one; what they cost is the
kernel's work before that.  They come as from a network card, in bursts of 64: the generator has processor 0, and
receive packet steering takes its packets to the server's.  XDP native runs before that steering, where the interrupt
is: what it drops never comes to the server's processor; beside that it is measured with the driver's poll moved there.
The generator takes only the time of processor 0 that nobody wants (SCHED_IDLE), and does so in the undisturbed runs
too, in which it drops all that it makes.
"""

import ctypes
import multiprocessing
import os
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import flood, kit
from bench.kernel import filter_drops, pinned_map, time_out_flood
from bench.kit import NotMeasuredError, Report, Row, Run, column, ratios, show
from bench.servers import SOURCES, Haproxy, Ours, free_port
from bench.siege import Honest
from bench.userspace import peer
from bench.xdp import SEND, Line, load_xdp, xdp_on
from tt import bpf_load
from tt.bpf import Map

RATE = 400_000  # SYNs a second
BURST = 64
LATE = 20_000_000  # ns of SYNs that the generator may catch up when others had its processor
APART = 50_000  # ns between two bursts at the least: a veth holds 256 frames for its poll
NEVER = 2**64 - 1
NATIVE = "ours, XDP native"
OUTSTANDING = 16  # on each connection, so that the server, and not the client, is what the rate hangs on
WITHOUT_END = 2**32 - 1  # frames: minutes
NEIGHBOUR, NEIGHBOUR_MAC = "10.77.0.2", "02:00:00:00:00:09"  # where flood.py's SYNs come from
PR_SET_PDEATHSIG = 1

Counter = Callable[[], int]


# ---- the generator --------------------------------------------------------------------------------------------------


def _program(verdict: int) -> bytes:
    """flood.py's program behind a gate: a frame is dropped unless it is due.  r6 is the context, r8 the pace (the one
    value of the map: when the next burst is due, left of this one, ns a burst, made, when the next may be), r7 what is
    left, r9 when due.
    """
    load8, store8, set4, move, add, add_register, call = 0x79, 0x7B, 0x62, 0xBF, 0x07, 0x0F, 0x85
    set_, skip_if, skip_unless, skip_if_over, skip_if_not_under, leave, load_map = (
        0xB7,
        0x15,
        0x55,
        0x2D,
        0x3D,
        0x95,
        0x18,
    )
    due, left, each, made, apart = 0, 8, 16, 24, 32
    one, make = flood.instruction, flood.program_of(verdict)
    count = [
        one(add, 7, number=-1), one(store8, 8, 7, left),
        one(load8, 7, 8, made), one(add, 7, number=1), one(store8, 8, 7, made),
        one(move, 1, 6),
    ]  # fmt: skip
    to_the_drop = len(count) + len(make) // 8
    burst = [
        one(load8, 1, 8, each), one(move, 2, 0), one(add, 2, number=-LATE),
        one(skip_if_not_under, 9, 2, 1), one(move, 9, 2),  # what is older is let go
        one(add_register, 9, 1), one(store8, 8, 9, due), one(set_, 7, number=BURST),
        one(add, 0, number=APART), one(store8, 8, 0, apart),
    ]  # fmt: skip
    clock = [
        one(call, number=5),
        one(load8, 9, 8, apart), one(skip_if_over, 9, 0, len(burst) + to_the_drop + 2),
        one(load8, 9, 8, due), one(skip_if_over, 9, 0, len(burst) + to_the_drop),
    ]  # fmt: skip
    gate = [one(move, 8, 0), one(load8, 7, 8, left), one(skip_unless, 7, 0, len(clock) + len(burst))]
    pace = [
        one(move, 6, 1), one(load_map, 1), one(0), one(set4, 10, offset=-4), one(move, 2, 10), one(add, 2, number=-4),
        one(call, number=1), one(skip_if, 0, 0, len(gate) + len(clock) + len(burst) + to_the_drop),
    ]  # fmt: skip
    drop = [one(set_, number=flood.DROP), one(leave)]
    return b"".join([*pace, *gate, *clock, *burst, *count, make, *drop])


class Generator:
    """Makes SYNs to a port at a pace, in a process of its own."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._pace = bpf_load.create_map("array", (4, 40), 1, "pace")
        self._programs = {
            verdict: load_xdp(_program(verdict), {1: ("pace", self._pace)}) for verdict in (flood.PASS, SEND)
        }
        self._line._run(self._programs[flood.PASS], 1, 1)  # whether this kernel has live frames: here it can be said

    def close(self) -> None:
        for program in self._programs.values():
            os.close(program)
        self._pace.close()

    @contextmanager
    def running(self, port: int, verdict: int, rate: int) -> Iterator[Counter]:
        """At so many a second, 0: dropping all; yields how many it has let go."""
        first = time.monotonic_ns() if rate else NEVER
        self._pace.update(bytes(4), struct.pack("=5Q", first, 0, BURST * 10**9 // max(rate, 1), 0, 0))
        own = multiprocessing.get_context("fork").Process(target=self._make, args=(port, verdict), daemon=True)
        own.start()
        try:
            yield lambda: int(struct.unpack("=5Q", self._pace.lookup(bytes(4)) or bytes(40))[3])
        finally:
            own.kill()
            own.join()

    def _make(self, port: int, verdict: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, {kit.LOAD_CPU})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        self._line.begin_at(verdict)
        self._line._run(self._programs[verdict], port, WITHOUT_END)


# ---- to the server's processor --------------------------------------------------------------------------------------


@contextmanager
def _steered() -> Iterator[Path]:
    """Packets that the stack takes up from the line go to the server's processor; yields the line in a sysfs that
    shows this network namespace.
    """
    with tempfile.TemporaryDirectory(prefix="bench_sys_") as folder:
        kit.output_of("mount", "-t", "sysfs", "sysfs", folder)
        try:
            device = Path(folder) / "class/net" / flood.INTERFACE
            try:
                (device / "queues/rx-0/rps_cpus").write_text(f"{1 << kit.SERVER_CPU:x}")
            except OSError as error:
                raise NotMeasuredError(f"receive packet steering (CONFIG_RPS): {error.strerror}") from None
            # Answers to SYNs leave for a neighbour that never asks back; their MAC is nobody's, so there they end.
            neighbour = (NEIGHBOUR, "lladdr", NEIGHBOUR_MAC, "dev", flood.INTERFACE, "nud", "permanent")
            kit.output_of("ip", "neighbour", "replace", *neighbour)
            yield device
        finally:
            kit.output_of("umount", folder)


@contextmanager
def _polled_by_server(device: Path, line: Line, block_map: Map, port: int) -> Iterator[Counter]:
    """XDP native, by a thread of the kernel that polls the driver on the server's processor."""
    others = set(_polls())
    with xdp_on(line.inside, block_map, port, "native") as dropped:
        try:
            (device / "threaded").write_text("1")
        except OSError as error:
            raise NotMeasuredError(f"a driver's poll in a thread needs Linux 5.12: {error.strerror}") from None
        for pid in set(_polls()) - others:
            os.sched_setaffinity(pid, {kit.SERVER_CPU})
        try:
            yield dropped
        finally:
            (device / "threaded").write_text("0")


def _polls() -> Iterator[int]:
    """The kernel's threads that poll an interface of that name, in any namespace."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text().startswith(f"napi/{flood.INTERFACE}"):
                yield int(path.parent.name)


# ---- the sides ------------------------------------------------------------------------------------------------------


class Reached(Haproxy):
    """On every address, so that SYNs reach it."""

    def prepare(self) -> None:
        super().prepare()
        self.file.write_text(self.file.read_text().replace("bind 127.0.0.1:", "bind :"))


@dataclass(frozen=True)
class Target:
    """A server, how it is asked, and where the SYNs go; `gate` is put before it and counts what it drops."""

    honest: Honest
    port: int
    gate: Callable[[], AbstractContextManager[Counter | None]]
    verdict: int = flood.PASS

    def run(self, generator: Generator, rate: int, seconds: float) -> Run:
        with self.gate() as dropped:
            before = dropped() if dropped else 0
            with generator.running(self.port, self.verdict, rate) as made:
                time.sleep(0.5)  # the load is there when the counting begins
                first, begun = made(), time.monotonic()
                run = dict(self.honest.run(seconds))
                run["syns"] = (made() - first) / (time.monotonic() - begun)
            run["made"] = made()
            if dropped:
                run["dropped"] = dropped() - before
        if rate and not run["made"]:
            raise RuntimeError("the generator made nothing: see above")
        return run


def synload(report: Report) -> None:
    seconds, runs = (0.5, 1) if report.quick else (1.5, 5)
    with ExitStack() as stack:
        block_map, path = stack.enter_context(pinned_map(SOURCES))
        time_out_flood(block_map)
        line = stack.enter_context(closing(Line()))
        device = stack.enter_context(_steered())
        generator = stack.enter_context(closing(Generator(line)))
        targets = _ours(stack, path)
        one = targets["ours, listener filter"]
        native = partial(xdp_on, line.inside, block_map, one.port, "native")
        polled = partial(_polled_by_server, device, line, block_map, one.port)
        targets = {
            NATIVE: Target(one.honest, one.port, native, SEND),
            f"{NATIVE} on the server's processor": Target(one.honest, one.port, polled, SEND),
            **targets,
        }
        haproxy = peer(report, stack, Reached)
        if haproxy is not None:
            asked = {
                "pid": haproxy.pid,
                "request": haproxy.request,
                "reply": haproxy.reply(),
                "outstanding": OUTSTANDING,
            }
            targets["HAProxy"] = Target(Honest("tls", haproxy.port2, asked), haproxy.port2, nullcontext)
        sides = {
            f"{name}{words}": partial(target.run, generator, rate, seconds)
            for name, target in targets.items()
            for words, rate in (("", RATE), (" undisturbed", 0))
        }
        results = kit.alternate(sides, runs)
    report.keep("synload", results)
    for name in targets:
        report.add(*_rows(name, results[name], results[f"{name} undisturbed"]))


def _ours(stack: ExitStack, path: Path) -> dict[str, Target]:
    targets = {}
    for name, options in (("ours, listener filter", ("-B", path)), ("ours, table alone", ())):
        port = free_port()
        ours = stack.enter_context(Ours(*options, "--listen", f"{flood.ADDRESS}:{port}"))
        honest = Honest("tt", ours.port, {"pid": ours.pid, "key": ours.key, "outstanding": OUTSTANDING})
        gate = partial(nullcontext, partial(filter_drops, ours)) if options else nullcontext
        targets[name] = Target(honest, port, gate)
    return targets


def _rows(name: str, loaded: list[Run], undisturbed: list[Run]) -> Iterator[Row]:
    words = f"honest requests, {RATE:,} SYN/s, {name}"
    row = Row(words, "/s", column(loaded, "rate"), "undisturbed", column(undisturbed, "rate"))
    row.ratio = ratios(loaded, undisturbed, "rate")
    row.wanted = "at least 0.9" if name == NATIVE else ""
    row.note = f"the SYNs came at {show(column(loaded, 'syns'))} a second"
    if "dropped" in loaded[0]:
        row.note += f", {sum(column(loaded, 'dropped')) / sum(column(loaded, 'made')):.1%} of them dropped there"
    yield row
    row = Row(words, "us p99", column(loaded, "p99_ns", 1000), "undisturbed", column(undisturbed, "p99_ns", 1000))
    row.ratio = ratios(undisturbed, loaded, "p99_ns")
    yield row
