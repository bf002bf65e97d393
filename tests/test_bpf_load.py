"""The listener filter on the real kernel: in a network namespace of the test's own, with unpinned maps and real SYNs.

The loopback judges a SYN at once: a connection is soon established, or its SYN is soon among those that the filter
counted.  So nothing here waits for a connection to time out.
"""

import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

import pytest
from harness import until
from process import need
from test_bpf import CAP_BPF, capabilities, own_namespace, raises

from tt import bpf, bpf_load, bpf_programs
from tt.bpf import Map
from tt.bpf_load import Filter, attach, detach, load_listener_filter

CLONE_NEWNET = 0x40000000
CLOCK_MONOTONIC_COARSE = 6  # clock_gettime(2); what bpf_ktime_get_coarse_ns reads
SECOND = 1_000_000_000  # ns
DAY = 86400  # s
ESTABLISHED = 1  # TCP_INFO's first byte
SO_ATTACH_FILTER, SO_LOCK_FILTER = 26, 44
GET_BY_ID = 13  # BPF_PROG_GET_FD_BY_ID
BAD, GOOD = "127.0.0.2", "127.0.0.3"
BAD6, SAME64, GOOD6 = "fd77::2", "fd77::3", "fd77:0:0:1::2"
EMBEDDED = "64:ff9b::7f00:2"  # BAD, as a translator writes it (RFC 6052)
FORMS = [
    pytest.param("hash", 4, 16, id="hash"),
    pytest.param("lru_hash", 4, 16, id="lru"),
    pytest.param("lpm_trie", 8, 20, id="lpm"),
]
VALUE_SIZES = [pytest.param(4, id="seconds"), pytest.param(8, id="ns")]


@pytest.fixture(autouse=True)
def _net() -> Iterator[None]:
    """A network namespace where the loopback has some IPv6 addresses."""
    need("ip", root=True)
    with own_namespace("net", CLONE_NEWNET):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in (BAD6, SAME64, GOOD6, EMBEDDED):
            subprocess.run(["ip", "address", "add", f"{address}/128", "dev", "lo", "nodad"], check=True)
        yield


def new_map(kind: str = "hash", key: int = 4, value: int = 4) -> Map:
    return bpf_load.create_map(kind, (key, value), 16, "tt_test")


class Lab:
    """A listener with the filter, for IPv4 and IPv6, and the filter's maps; all closed at the end."""

    def __init__(self, maps: Mapping[int, Map | None], ipv6_prefix: int = 64) -> None:
        self.maps = maps
        self.filter = load_listener_filter(maps, ipv6_prefix)
        self.listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port = self.listener.getsockname()[1]
        attach(self.filter, self.listener.fileno())

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.filter.close()
        self.listener.close()
        for one in self.maps.values():
            if one:
                one.close()

    @property
    def dropped(self) -> int:
        return self.filter.counters()["dropped_syns"]

    def write(self, source: str, value: int, bits: int | None = None) -> None:
        """An entry for an address, or for the network of its first `bits` bits; `value` as the kernel reads it."""
        address = ip_address(source)
        one = self.maps[address.version]
        assert one
        bits = bits or (32 if address.version == 4 else 64)
        packed = (int(address) >> address.max_prefixlen - bits << address.max_prefixlen - bits).to_bytes(
            address.max_prefixlen // 8, "big"
        )
        key = struct.pack("=I", bits) + packed if one.kind == "lpm_trie" else packed
        one.update(key, value.to_bytes(one.value_size, "little"))

    def time_out(self, source: str, seconds: float = 100, bits: int | None = None) -> None:
        """An entry that ends then."""
        one = self.maps[ip_address(source).version]
        assert one
        end = int(time.monotonic_ns() + seconds * SECOND)
        self.write(source, -(-end // SECOND) if one.value_size == 4 else end, bits)

    def connect(self, source: str) -> socket.socket | None:
        """A connection from there; None: its SYN was dropped."""
        before = self.dropped
        peer = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        peer.setblocking(False)
        peer.bind((source, 0))
        peer.connect_ex(("::1" if ":" in source else "127.0.0.1", self.port))

        def is_open() -> bool:
            return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED

        until(f"an answer or a drop of {source}", lambda: is_open() or self.dropped > before)
        if self.dropped == before:
            return peer
        peer.close()  # dropped, though it may be open: where this machine stood still the SYN was sent again
        return None

    def lets_in(self, source: str) -> bool:
        if peer := self.connect(source):
            peer.close()
        return peer is not None


def sent_again() -> int:
    """How many SYNs in this network namespace were sent anew, as those are that are dropped and not given up in 1 s."""
    lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(values[names.index("TCPSynRetrans")])


def seconds_now() -> int:
    """The second that the kernel programs are in."""
    return time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) // SECOND


# ---- whose SYNs it drops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "key4", "key6"), FORMS)
@pytest.mark.parametrize("value", VALUE_SIZES)
def test_syns_of_timed_out_sources_are_dropped_and_no_others(kind: str, key4: int, key6: int, value: int) -> None:
    with Lab({4: new_map(kind, key4, value), 6: new_map(kind, key6, value)}) as lab:
        sources = (BAD, GOOD, BAD6, SAME64, GOOD6)
        assert [lab.lets_in(source) for source in sources] == [True] * 5
        lab.time_out(BAD)
        lab.time_out(BAD6)
        assert [lab.lets_in(source) for source in sources] == [False, True, False, False, True]
        assert lab.dropped == 3 + sent_again()
        lab.time_out(BAD, -2)
        lab.time_out(BAD6, -2)
        if value == 4:  # rounded up: the end may be the second that is running
            lab.write(BAD, seconds_now())
            lab.write(BAD6, seconds_now())
        assert [lab.lets_in(source) for source in sources] == [True] * 5


@pytest.mark.parametrize("value", VALUE_SIZES)
def test_the_second_of_the_end_is_over_and_the_next_but_one_is_not(value: int) -> None:
    """Dropped while floor(now) < value."""
    unit = 1 if value == 4 else SECOND
    with Lab({4: new_map("hash", 4, value)}) as lab:
        lab.write(BAD, seconds_now() * unit)
        assert lab.lets_in(BAD)
        while True:
            end = seconds_now() + 2
            lab.write(BAD, end * unit)
            let_in = lab.lets_in(BAD)
            if seconds_now() < end:  # else this machine stood still, and the end came first
                break
        assert not let_in
        lab.write(BAD, 1)  # a second, or a nanosecond, after the boot
        assert lab.lets_in(BAD)


@pytest.mark.parametrize("value", VALUE_SIZES)
def test_preloaded_entries_drop_for_as_long_as_they_stand(value: int) -> None:
    unit = 1 if value == 4 else SECOND
    with Lab({4: new_map("hash", 4, value), 6: new_map("hash", 16, value)}) as lab:
        for forever in (0, (seconds_now() + 31 * DAY) * unit, 256**value - 1):
            lab.write(BAD, forever)
            lab.write(BAD6, forever)
            assert not lab.lets_in(BAD), forever
            assert not lab.lets_in(SAME64), forever


def test_a_lifted_time_out_lets_in_at_once() -> None:
    one = new_map()
    with Lab({4: one}) as lab:
        lab.time_out(BAD)
        assert not lab.lets_in(BAD)
        one.delete(ip_address(BAD).packed)
        assert lab.lets_in(BAD)


def test_a_trie_holds_networks_of_any_length() -> None:
    with Lab({4: new_map("lpm_trie", 8), 6: new_map("lpm_trie", 20)}, ipv6_prefix=48) as lab:
        lab.time_out("127.0.0.2", bits=31)
        lab.time_out("fd77::", bits=48)
        assert [lab.lets_in(source) for source in (BAD, GOOD, "127.0.0.4")] == [False, False, True]
        assert [lab.lets_in(source) for source in (BAD6, GOOD6)] == [False, False]
        lab.time_out(GOOD6, -2, bits=128)  # the longest match decides, and that has ended
        assert [lab.lets_in(source) for source in (BAD6, GOOD6)] == [False, True]


@pytest.mark.parametrize(("prefix", "expected"), [(128, [False, True, True]), (48, [False, False, False])])
def test_a_hash_holds_as_many_bits_as_it_was_loaded_with(prefix: int, expected: list[bool]) -> None:
    with Lab({6: new_map("hash", 16)}, ipv6_prefix=prefix) as lab:
        lab.time_out(BAD6, bits=prefix)
        assert [lab.lets_in(source) for source in (BAD6, SAME64, GOOD6)] == expected


def test_an_ipv4_address_within_ipv6_is_looked_up_as_itself() -> None:
    with Lab({4: new_map(), 6: new_map("hash", 16)}) as lab:
        lab.write("64:ff9b::", 0)  # its /64, which is everybody behind a translator
        assert lab.lets_in(EMBEDDED)
        lab.time_out(BAD)
        assert not lab.lets_in(EMBEDDED)


@pytest.mark.parametrize("family", [4, 6])
def test_a_family_without_a_map_passes(family: int) -> None:
    with Lab({family: new_map("hash", 4 if family == 4 else 16), 10 - family: None}) as lab:
        lab.time_out(BAD if family == 4 else BAD6)
        assert [lab.lets_in(source) for source in (BAD, BAD6)] == [family != 4, family != 6]


def test_two_maps_with_different_values_work_in_one_program() -> None:
    for value4, value6 in ((4, 8), (8, 4)):
        with Lab({4: new_map("lpm_trie", 8, value4), 6: new_map("hash", 16, value6)}) as lab:
            lab.time_out(BAD)
            lab.time_out(BAD6)
            assert [lab.lets_in(s) for s in (BAD, GOOD, BAD6, GOOD6)] == [False, True, False, True]


# ---- what it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BAD, BAD6])
def test_an_established_connection_of_a_timed_out_source_goes_on(source: str) -> None:
    with Lab({4: new_map(), 6: new_map("hash", 16)}) as lab:
        peer = lab.connect(source)
        assert peer
        served = lab.listener.accept()[0]
        lab.time_out(source)
        assert not lab.lets_in(source)
        for one, other in ((peer, served), (served, peer)):
            one.settimeout(10)
            other.settimeout(10)
            one.sendall(bytes(100_000))
            got = 0
            while got < 100_000:
                got += len(other.recv(65536))
        peer.shutdown(socket.SHUT_WR)
        assert served.recv(1) == b""
        peer.close()
        served.close()


def test_it_is_gone_with_its_last_socket_and_was_on_no_other() -> None:
    with Lab({4: new_map()}) as lab:
        lab.time_out(BAD)
        assert not lab.lets_in(BAD)
        with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as peer:
            peer.bind((BAD, 0))
            peer.settimeout(10)
            peer.connect(other.getsockname())
        program = program_id(lab.filter)
    until("the program's end", lambda: not is_loaded(program))


def test_a_filter_that_its_loader_closed_stays_with_the_socket() -> None:
    one = new_map()
    with Lab({4: one}) as lab:
        lab.time_out(BAD)
        program = program_id(lab.filter)
        counted = Map(os.dup(lab.filter._dropped_syns.fd))
        lab.filter.close()
        lab.filter.close()
        one.close()
        assert is_loaded(program)
        with socket.socket() as peer:
            peer.setblocking(False)
            peer.bind((BAD, 0))
            peer.connect_ex(("127.0.0.1", lab.port))
            until("a drop", lambda: any(counted.lookup(bytes(4)) or b""))
        counted.close()


def test_drops_are_summed_over_the_processors() -> None:
    with Lab({4: new_map()}) as lab:
        lab.time_out(BAD)
        allowed = os.sched_getaffinity(0)
        try:
            for count, cpu in enumerate(sorted(allowed), 1):
                os.sched_setaffinity(0, {cpu})
                assert not lab.lets_in(BAD)
                assert lab.dropped == count + sent_again()
        finally:
            os.sched_setaffinity(0, allowed)


# ---- attach and detach -----------------------------------------------------------------------------------------------


def test_a_filter_found_on_a_socket_is_taken_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
        assert detach(listener.fileno()) is False
        nothing_passes = struct.pack("=HBBI", 6, 0, 0, 0)  # BPF_RET | BPF_K, 0 bytes
        program = struct.pack("@HP", 1, bpf.address(nothing_passes))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        assert detach(listener.fileno()) is True
        assert detach(listener.fileno()) is False
        peer.settimeout(10)
        peer.connect(listener.getsockname())


def test_a_socket_that_takes_no_filter_is_said_to() -> None:
    loaded = load_listener_filter({4: new_map()}, 64)
    with socket.socket() as locked, Path("/dev/null").open("rb") as file:
        locked.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        with raises(errno.EPERM, "cannot change the filter of this socket: whoever opened it locked it"):
            attach(loaded, locked.fileno())
        with raises(errno.ENOTSOCK, "this descriptor is no socket"):
            attach(loaded, file.fileno())
        assert os.fstat(file.fileno())
    loaded.close()


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_cap_bpf_alone_loads_and_attaches_it() -> None:
    maps = {4: new_map("lpm_trie", 8, 8), 6: new_map("hash", 16)}
    with capabilities(CAP_BPF), Lab(maps) as lab:
        lab.time_out(BAD)
        assert [lab.lets_in(source) for source in (BAD, GOOD)] == [False, True]


def test_without_cap_bpf_it_says_what_is_missing_and_leaves_nothing_open() -> None:
    maps = {4: new_map()}
    before = os.listdir("/proc/self/fd")
    with capabilities(), raises(errno.EPERM, "needs CAP_BPF or root"):
        load_listener_filter(maps, 64)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("value", VALUE_SIZES)
@pytest.mark.parametrize("only", [None, 4, 6])
def test_every_branch_passes_the_verifier_whatever_the_constants_are(
    monkeypatch: pytest.MonkeyPatch, value: int, only: int | None
) -> None:
    """Without frozen constants no branch is excluded, as before Linux 6.17 for who has CAP_BPF alone."""
    monkeypatch.setattr(bpf_load, "freeze_map", lambda _: None)
    for kind, key4, key6 in (("hash", 4, 16), ("lpm_trie", 8, 20)):
        maps = {4: new_map(kind, key4, value), 6: new_map(kind, key6, 12 - value)}
        with capabilities(CAP_BPF):
            load_listener_filter({only: maps[only]} if only else maps, 64).close()


def test_a_kernel_without_the_coarse_clock_gets_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = 0x7FFF  # no kernel's helper
    coarse, other = (struct.pack("<BBhi", bpf_load.CALL, 0, 0, n) for n in (bpf_load.KTIME_GET_COARSE_NS, unknown))
    assert coarse in bpf_programs.LISTENER.instructions
    older = bpf_programs.LISTENER._replace(instructions=bpf_programs.LISTENER.instructions.replace(coarse, other))
    monkeypatch.setattr(bpf_load, "LISTENER", older)
    monkeypatch.setattr(bpf_load, "KTIME_GET_COARSE_NS", unknown)
    with Lab({4: new_map(value=8)}) as lab:
        lab.time_out(BAD)
        assert not lab.lets_in(BAD)
        lab.write(BAD, time.monotonic_ns())
        assert lab.lets_in(BAD)


def test_a_program_that_the_verifier_refuses_is_told_in_one_line_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_exit = struct.pack("<BBhi", 0x95, 0, 0, 0)
    monkeypatch.setattr(
        bpf_load, "LISTENER", bpf_programs.LISTENER._replace(instructions=only_exit, maps={}, constants={})
    )
    maps = {4: new_map()}
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"the kernel's verifier refused the listener filter: R0 !read_ok") as caught:
        load_listener_filter(maps, 64)
    assert "\n" not in caught.value.strerror
    assert os.listdir("/proc/self/fd") == before


def program_id(loaded: Filter) -> int:
    info = bpf.ctypes.create_string_buffer(8)
    bpf.call(bpf.INFO, struct.pack("=IIQ", loaded.fd, 8, bpf.address(info)), {}, "")
    return int(struct.unpack("=II", info.raw)[1])


def is_loaded(program: int) -> bool:
    try:
        os.close(bpf.call(GET_BY_ID, struct.pack("=III", program, 0, 0), {}, ""))
    except FileNotFoundError:
        return False
    return True
