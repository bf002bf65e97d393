"""What the XDP program does against a flood: every way to drop a SYN, one above the other, and the program's own cost.

The SYNs are made inside the kernel (flood.py): an ordinary sender costs more than any of this and hides it.  Whatever
drops is put in place for its own run alone, and its own counter must have seen every packet of that run.
Rules: namespaces of the bench, nothing pinned.  It must not know what the honest pay: that is synload.py.
"""

import ctypes
import json
import os
import shutil
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from itertools import count

from bench import flood, kit
from bench.kernel import accept_and_drop, pinned_map, time_out_flood
from bench.kit import NotMeasuredError, Report, Row, Run, Side, column, ratios, show
from bench.servers import DEPS, SOURCES, Ours
from tt import bpf, bpf_load, xdp
from tt.bpf import Map
from tt.bpf_programs import Program

PORT = 5000
SEND = 3  # XDP_TX: out of the interface on which the frame was made
SET, LEAVE = 0xB7, 0x95  # BPF instructions: a number to a register; the end

NATIVE, GENERIC, FILTER, USER_SPACE = "XDP native", "XDP generic", "listener filter", "accept and drop"
INGRESS, PREROUTING = "nftables ingress", "nftables prerouting"
COUNTED = "nftables ingress, a counter an element"
ALONE = "the generator alone"

Dropped = Callable[[], int]  # packets, since whatever drops them is in place
Hook = Callable[[], AbstractContextManager[Dropped]]


# ---- where the packets come in --------------------------------------------------------------------------------------


class Line(flood.Flood):
    """SYNs as a driver hands them over (SEND: they leave one end of a veth, and XDP native meets them at the other), or
    as the stack takes them up (PASS).  The program of XDP native is no part of the stack, so it needs the former; its
    way through the veth is booked on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = self._index
        self._places = {flood.PASS: self.inside, flood.DROP: self.inside, SEND: socket.if_nametoindex("tt_out")}

    def ns_per_packet(self, port: int, packets: int, verdict: int = flood.PASS) -> float:
        self.begin_at(verdict)
        return super().ns_per_packet(port, packets, verdict)

    def begin_at(self, verdict: int) -> None:
        """Make the next frames at the end from which that verdict brings them in."""
        self._index = self._places[verdict]


@contextmanager
def xdp_on(interface: int, block_map: Map, port: int, mode: str) -> Iterator[Dropped]:
    """Our XDP program on an interface, as `tt bpf load` attaches it, but for the pin."""
    with closing(xdp.load_program({4: block_map}, xdp.Settings((port,), all_packets=False), mode)) as program:
        attr = struct.pack("=4I", program.fd, interface, xdp.BPF_XDP, xdp.MODES[mode])
        link = bpf.call(xdp.LINK_CREATE, attr, xdp.REFUSED, flood.INTERFACE)
        try:
            now = xdp.attached(interface)
            if now is None or now.mode != mode:
                raise RuntimeError(f"the XDP program is attached as {now.mode if now else 'nothing'}, not {mode}")
            yield lambda: program.counters()["dropped_packets"]
        finally:
            bpf.call(xdp.LINK_DETACH, struct.pack("=I", link), {}, "the link")  # at once, not when its end comes round
            os.close(link)


@contextmanager
def _filter_on(block_map: Map) -> Iterator[Dropped]:
    with (
        closing(bpf_load.load_listener_filter({4: block_map}, 64)) as listener_filter,
        socket.create_server((flood.ADDRESS, PORT), backlog=4096) as listener,
    ):
        bpf_load.attach(listener_filter, listener.fileno())
        yield lambda: listener_filter.counters()["dropped_syns"]


@contextmanager
def _nothing(counted: int) -> Iterator[Dropped]:
    """For what has no counter to be read between two runs: as if all had been counted."""
    calls = iter((0, counted))
    yield lambda: next(calls)


# ---- nftables -------------------------------------------------------------------------------------------------------


def _nft(script: str) -> None:
    kit.output_of("nft", "--file", "-", stdin=script)


class Nft:
    """A set of all sources, each with its own end, and the rule that drops them, as an operator would have them.

    The set stays where it is between the runs, and its rule comes and goes.  `in_set`: each element counts, instead of
    the rule.
    """

    def __init__(self, family: str, hook: str, *, in_set: bool = False) -> None:
        self._table, self._hook = f"{family} tt_{'elements' if in_set else 'rule'}", hook
        self._in_set = in_set
        first = struct.unpack("!I", socket.inet_aton(flood.NETWORK))[0]
        sources = (socket.inet_ntoa(struct.pack("!I", first + number)) for number in range(SOURCES))
        elements = ", ".join(f"{source} timeout 1h" for source in sources)
        kind = f"type ipv4_addr; size {SOURCES}; flags timeout; {'counter;' if in_set else ''}"
        _nft(f"table {self._table} {{ set timed_out {{ {kind}\n}}\n}}")
        _nft(f"add element {self._table} timed_out {{ {elements} }}")

    def close(self) -> None:
        _nft(f"delete table {self._table}")

    @contextmanager
    def rule(self, counted: int) -> Iterator[Dropped]:
        """The rule in place; `counted`: what its counter is to show where it has none."""
        chain = f"{self._table} drops"
        counter = "" if self._in_set else "counter "
        _nft(
            f"add chain {chain} {{ type filter hook {self._hook}; policy accept; }}\n"
            f"add rule {chain} ip saddr @timed_out {counter}drop"
        )
        try:
            if self._in_set:
                with _nothing(counted) as dropped:
                    yield dropped
            else:
                yield lambda: self._sum("--terse", f"list chain {chain}")  # without the set: half a second
        finally:
            _nft(f"flush chain {chain}\ndelete chain {chain}")

    def counted_by_elements(self) -> int:
        return self._sum(f"list set {self._table} timed_out")

    @staticmethod
    def _sum(*command: str) -> int:
        """Of all counters in what a command lists."""
        counts: list[int] = []

        def take(item: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
            if isinstance(counter := item.get("counter"), dict):
                counts.append(counter["packets"])
            return item

        json.loads(kit.output_of("nft", "--json", *command), object_hook=take)
        return sum(counts)


# ---- the ladder -----------------------------------------------------------------------------------------------------


def ladder(report: Report) -> None:
    """Attempts of 65,536 timed-out sources that one processor turns away a second, by what turns them away."""
    packets, runs = (100_000, 1) if report.quick else (500_000, 7)
    with ExitStack() as stack:
        block_map, _ = stack.enter_context(pinned_map(SOURCES))
        time_out_flood(block_map)
        line = stack.enter_context(closing(Line()))
        stack.enter_context(kit.on_load_cpu())
        sides: dict[str, Side] = {
            NATIVE: partial(_dropped, line, packets, partial(xdp_on, line.inside, block_map, PORT, "native"), SEND)
        }
        by_element = _nft_sides(report, stack, line, packets, sides)
        sides[GENERIC] = partial(_dropped, line, packets, partial(xdp_on, line.inside, block_map, PORT, "generic"))
        sides[FILTER] = partial(_dropped, line, packets, partial(_filter_on, block_map))
        sides[USER_SPACE] = _user_space(report, stack)
        sides[ALONE] = partial(_dropped, line, packets, partial(_nothing, packets), flood.DROP)
        results = kit.compare(sides, runs, "ns") if INGRESS in sides else kit.alternate(sides, runs)
        if by_element is not None and by_element.counted_by_elements() < packets * len(results[COUNTED]):
            raise RuntimeError(f"{COUNTED}: the elements did not count every packet")
    report.keep("ladder", results)
    report.add(*_ladder_rows(results))


def _dropped(line: Line, packets: int, hook: Hook, verdict: int = flood.PASS) -> Run:
    with hook() as dropped:
        before = dropped()
        ns = line.ns_per_packet(PORT, packets, verdict)
        met = dropped() - before
    if met < packets:
        raise RuntimeError(f"only {met} of {packets} SYNs were dropped where they should have been")
    return {"ns": ns, "rate": 1e9 / ns}


def _nft_sides(report: Report, stack: ExitStack, line: Line, packets: int, sides: dict[str, Side]) -> Nft | None:
    """Adds them; returns the one whose elements count.  None, and said, where there is no nft."""
    if shutil.which("nft") is None:
        report.not_measured(f"nftables in the ladder: nft is not installed: {DEPS}")
        return None
    ingress = f"ingress device {flood.INTERFACE} priority 0"
    by_element = Nft("netdev", ingress, in_set=True)
    kinds = {INGRESS: Nft("netdev", ingress), COUNTED: by_element, PREROUTING: Nft("inet", "prerouting priority raw")}
    for name, nft in kinds.items():
        stack.callback(nft.close)
        sides[name] = partial(_dropped, line, packets, partial(nft.rule, packets))
    return by_element


def _user_space(report: Report, stack: ExitStack) -> Side:
    ours = Ours()
    ours.cpu = kit.LOAD_CPU
    stack.enter_context(ours)
    ours.time_out_hostile()

    def dropped() -> Run:
        ns = accept_and_drop(ours, 5_000 if report.quick else 40_000)
        return {"ns": ns, "rate": 1e9 / ns}

    return dropped


def _ladder_rows(results: dict[str, list[Run]]) -> Iterator[Row]:
    alone = statistics.median(column(results[ALONE], "ns"))
    for name, runs in results.items():
        if name in (INGRESS, ALONE):
            continue
        row = _beside_nft(f"dropped by {name}", runs, results.get(INGRESS, []))
        ns = statistics.median(column(runs, "ns"))
        row.note = f"{ns:.0f} ns each, its own client's part among them"
        if name != USER_SPACE:
            row.note = f"{ns:.0f} ns each, {alone:.0f} of them the generator's"
        yield row
    without = {name: _without_generator(results[name], results[ALONE]) for name in (NATIVE, INGRESS) if name in results}
    yield _beside_nft(f"dropped by {NATIVE}, generator taken off", without[NATIVE], without.get(INGRESS, []))
    if COUNTED in results:
        row = Row(f"dropped by {NATIVE}", "/s and core", column(results[NATIVE], "rate"), COUNTED)
        row.peer, row.ratio = column(results[COUNTED], "rate"), ratios(results[NATIVE], results[COUNTED], "rate")
        row.wanted = "at least 1.8"  # a set with timeout and counter, as its declaration says them
        yield row


def _beside_nft(name: str, runs: list[Run], nft: list[Run]) -> Row:
    ratio = ratios(runs, nft, "rate") if nft else []
    return Row(name, "/s and core", column(runs, "rate"), INGRESS, column(nft, "rate"), ratio)


def _without_generator(runs: list[Run], alone: list[Run]) -> list[Run]:
    return [{"rate": 1e9 / (run["ns"] - made["ns"])} for run, made in zip(runs, alone, strict=True)]


# ---- the program alone ----------------------------------------------------------------------------------------------


def program(report: Report) -> None:
    """The program's time on one frame over and over, over that of an empty one, with 65,536 entries in the map."""
    repeat, runs = (200_000, 5) if report.quick else (2_000_000, 21)
    with ExitStack() as stack:
        block_map, _ = stack.enter_context(pinned_map(SOURCES))
        time_out_flood(block_map)
        settings = xdp.Settings((PORT,), all_packets=False)
        ours = stack.enter_context(closing(xdp.load_program({4: block_map}, settings))).fd
        empty = load_xdp(flood.instruction(SET, number=flood.PASS) + flood.instruction(LEAVE), {})
        stack.callback(os.close, empty)
        stack.enter_context(kit.on_load_cpu())
        sides = {
            "a timed-out source": partial(_test_run, ours, _frames(flood.NETWORK, PORT), flood.DROP, repeat),
            "another source": partial(_test_run, ours, _frames("198.18.0.0", PORT), flood.PASS, repeat),
            "another port": partial(_test_run, ours, _frames(flood.NETWORK, PORT + 1), flood.PASS, repeat),
            "empty": partial(_test_run, empty, _frames(flood.NETWORK, PORT), flood.PASS, repeat),
        }
        results = kit.alternate(sides, runs)
    report.keep("program", results)
    nothing = results.pop("empty")
    for name, of_name in results.items():
        over = [run["ns"] - bare["ns"] for run, bare in zip(of_name, nothing, strict=True)]
        row = Row(f"XDP program, a SYN from {name}".replace("from another port", "to another port"), "ns", over)
        row.wanted = "" if "port" in name else "at most 25"
        row.note = f"over an empty program's {show(column(nothing, 'ns'))}"
        report.add(row)


def load_xdp(instructions: bytes, maps: dict[int, tuple[str, Map]]) -> int:
    """The descriptor of an XDP program that is no product's; `maps`: what an instruction loads, and its name."""
    names = {at: name for at, (name, _) in maps.items()}
    code = Program(instructions, names, {}, {"none": (0, 4)})
    return bpf_load.load(xdp.KINDS["native"], code, dict(maps.values()), {"none": bytes(4)})


def _frames(network: str, port: int) -> Iterator[bytes]:
    """A SYN from one source of a /16 for each run: where a hash has put its key, and behind which others, is chance."""
    first, frame = struct.unpack("!I", socket.inet_aton(network))[0], flood.frame_to(bytes(6), port)
    for number in count(step=3121):
        yield frame[:26] + struct.pack("!I", first + number % SOURCES) + frame[30:]


def _test_run(program_fd: int, frames: Iterator[bytes], verdict: int, repeat: int) -> Run:
    """CPU time of one run on the next of the frames, ns."""
    frame = next(frames)
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQQI", program_fd, 0, len(frame), 0, bpf.address(frame), 0, repeat), 80
    )
    begun = time.thread_time_ns()
    try:
        bpf.call(flood.PROG_TEST_RUN, attr, {}, "test run")  # type: ignore[arg-type]  # it is written to
    except OSError as error:
        raise NotMeasuredError(f"test runs of XDP programs: {error.strerror}") from None
    ns = (time.thread_time_ns() - begun) / repeat
    if (said := struct.unpack_from("=I", attr, 4)[0]) != verdict:
        raise RuntimeError(f"the program said {said} instead of {verdict}")
    return {"ns": ns}
