"""The XDP program's verdict on made-up frames, by BPF_PROG_TEST_RUN: no interface, nothing pinned, microseconds each.

A frame is at least 14 bytes there.  Every frame is also judged with a source that nobody timed out, and then passes.
"""

import ctypes
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process import need
from test_bpf import CAP_BPF, capabilities, own_namespace
from test_bpf_programs import load_generator

from tt import bpf, bpf_load, xdp
from tt.bpf import Map

TEST_RUN = 10
DROP, PASS = 1, 2  # enum xdp_action
CAP_NET_ADMIN, CAP_PERFMON = 12, 38
CLONE_NEWNS = 0x20000
SECOND = 1_000_000_000  # ns
FOR_EVER = 0
PORT = 5000
FIN, SYN, RST, ACK = 1, 2, 4, 16
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
HOP_BY_HOP, ROUTING, FRAGMENT, ESP, AH, NONE, DESTINATION = 0, 43, 44, 50, 51, 59, 60
BAD, GOOD = "192.0.2.1", "192.0.2.2"
BAD6, SAME64, GOOD6 = "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"
EMBEDDED = "64:ff9b::c000:201"  # BAD, as a translator writes it (RFC 6052)
SETTINGS = xdp.Settings((PORT,), all_packets=False)


@pytest.fixture(autouse=True)
def _root() -> None:
    need(root=True)


# ---- frames ----------------------------------------------------------------------------------------------------------


def tcp(flags: int = SYN, port: int = PORT, data: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, flags, 65535, 0, 0) + data


def udp(port: int = PORT) -> bytes:
    return struct.pack("!HHHH", 40000, port, 8, 0) + bytes(12)


def ethernet(kind: int, rest: bytes, *tags: int) -> bytes:
    """`tags`: the types that announce a VLAN tag each, the outermost first."""
    types = b"".join(struct.pack("!HH", tag, 7) for tag in tags)
    return b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02" + types + struct.pack("!H", kind) + rest


def ipv4(
    source: str, rest: bytes, *, protocol: int = TCP, options: bytes = b"", fragment: int = 0, first: int | None = None
) -> bytes:
    first = 0x45 + len(options) // 4 if first is None else first
    size = 20 + len(options) + len(rest)
    packed = ip_address(source).packed
    return struct.pack("!BBHHHBBH4s4s", first, 0, size, 1, fragment, 64, protocol, 0, packed, bytes(4)) + options + rest


def ipv6(source: str, rest: bytes, *, following: int = TCP, first: int = 0x60) -> bytes:
    return struct.pack("!BxHHBB16s16s", first, 0, len(rest), following, 64, ip_address(source).packed, bytes(16)) + rest


def extended(source: str, *kinds: int, upper: int = TCP, size: int = 8) -> bytes:
    """An IPv6 SYN behind extension headers of `size` bytes."""
    rest = tcp()
    for following in (*kinds[1:], upper)[::-1]:
        rest = struct.pack("!BB", following, size // 8 - 1) + bytes(size - 2) + rest
    return ipv6(source, rest, following=kinds[0])


V4, V6, ARP, LLDP, Q, AD, PPPOE = 0x0800, 0x86DD, 0x0806, 0x88CC, 0x8100, 0x88A8, 0x8864


def v4(rest: bytes = tcp(), **form: int | bytes) -> Callable[[str], bytes]:
    return lambda source: ethernet(V4, ipv4(source, rest, **form))


def v6(rest: bytes = tcp(), **form: int) -> Callable[[str], bytes]:
    return lambda source: ethernet(V6, ipv6(source, rest, **form))


def tagged(kind: int, *tags: int) -> Callable[[str], bytes]:
    return lambda source: ethernet(kind, ipv4(source, tcp()) if kind == V4 else ipv6(source, tcp()), *tags)


def behind(*kinds: int, **form: int) -> Callable[[str], bytes]:
    return lambda source: ethernet(V6, extended(source, *kinds, **form))


DROPPED_4 = {
    "SYN": v4(), "one tag": tagged(V4, Q), "a provider's tag": tagged(V4, AD), "two tags": tagged(V4, AD, Q),
    "two tags of one kind": tagged(V4, Q, Q), "options": v4(options=bytes(4)), "most options": v4(options=bytes(40)),
    "SYN with data (fast open)": v4(tcp(data=b"x" * 100)), "do not fragment": v4(fragment=0x4000),
    "SYN and FIN": v4(tcp(SYN | FIN)),
}  # fmt: skip
DROPPED_6 = {
    "SYN": v6(), "one tag": tagged(V6, Q), "two tags": tagged(V6, AD, Q), "hop-by-hop": behind(HOP_BY_HOP),
    "routing": behind(ROUTING), "destination": behind(DESTINATION), "long": behind(DESTINATION, size=2048),
    "three": behind(HOP_BY_HOP, ROUTING, DESTINATION), "six": behind(*[DESTINATION] * 6),
}  # fmt: skip
PASSED_4 = {
    "SYN-ACK": v4(tcp(SYN | ACK)), "data": v4(tcp(ACK, data=b"x")), "RST": v4(tcp(RST)), "no flags": v4(tcp(0)),
    "another port": v4(tcp(port=5001)), "port 0": v4(tcp(port=0)), "swapped port": v4(tcp(port=0x8813)),
    "UDP": v4(udp(), protocol=UDP), "ICMP": v4(bytes(28), protocol=ICMP), "three tags": tagged(V4, AD, Q, Q),
    "a first fragment": v4(fragment=0x2000), "a later fragment": v4(fragment=0x2001), "the last": v4(fragment=3),
    "version 6 as IPv4": v4(first=0x65),
    "a header of 16": lambda source: ethernet(V4, ipv4(source, b"", first=0x44)[:16] + tcp()),
    "of 0": v4(first=0x40),
    "options that are not there": v4(first=0x4F),
    "ARP": lambda source: ethernet(ARP, struct.pack("!HHBBH6s4s6s4s", 1, V4, 6, 4, 1, b"", ip_address(source).packed,
                                                    b"", b"") + bytes(18)),
    "LLDP": lambda _: ethernet(LLDP, bytes(46)), "PPPoE": lambda source: ethernet(PPPOE, ipv4(source, tcp())),
    "an 802.3 length": lambda source: ethernet(40, ipv4(source, tcp())),
    "only a tag": lambda _: ethernet(V4, b"", Q),
}  # fmt: skip
PASSED_6 = {
    "SYN-ACK": v6(tcp(SYN | ACK)), "data": v6(tcp(ACK, data=b"x")), "another port": v6(tcp(port=5001)),
    "UDP": v6(udp(), following=UDP), "neighbour solicitation": v6(b"\x87" + bytes(23), following=ICMP6),
    "echo": v6(b"\x80" + bytes(7), following=ICMP6), "a fragment": behind(FRAGMENT), "ESP": behind(ESP),
    "AH": behind(AH), "no next header": v6(following=NONE), "seven": behind(*[DESTINATION] * 7),
    "UDP behind one": behind(HOP_BY_HOP, upper=UDP), "version 4 as IPv6": v6(first=0x40),
    "an extension that is not there": v6(b"\x06\xff" + tcp(), following=HOP_BY_HOP), "three tags": tagged(V6, AD, Q, Q),
}  # fmt: skip


# ---- the program -----------------------------------------------------------------------------------------------------


class Lab:
    """The program with a map for each family."""

    def __init__(
        self,
        kind: str = "hash",
        value: int = 4,
        *,
        families: tuple[int, ...] = (4, 6),
        options: xdp.Settings = SETTINGS,
    ) -> None:
        keys = {4: 8, 6: 20} if kind == "lpm_trie" else {4: 4, 6: 16}
        self.maps = {family: bpf_load.create_map(kind, (keys[family], value), 16, "tt_test") for family in families}
        self.program = xdp.load_program(self.maps, options)

    def write(self, source: str, value: int, bits: int | None = None) -> None:
        """An entry for an address or the network of its first bits; `value` as the kernel reads it."""
        address = ip_address(source)
        one = self.maps[address.version]
        bits = bits or (32 if address.version == 4 else 64)
        kept = int(address) >> address.max_prefixlen - bits << address.max_prefixlen - bits
        packed = kept.to_bytes(address.max_prefixlen // 8, "big")
        key = struct.pack("=I", bits) + packed if one.kind == "lpm_trie" else packed
        one.update(key, value.to_bytes(one.value_size, "little"))

    def time_out(self, source: str, seconds: float = 3600) -> None:
        one = self.maps[ip_address(source).version]
        end = time.monotonic_ns() + int(seconds * SECOND)
        self.write(source, -(-end // SECOND) if one.value_size == 4 else end)

    def drops(self, frame: bytes) -> bool:
        return run(self.program.fd, frame) == DROP

    def close(self) -> None:
        self.program.close()
        for one in self.maps.values():
            one.close()


def run(program: int, frame: bytes) -> int:
    """The verdict; fails where it is none of the two."""
    data = ctypes.create_string_buffer(frame, len(frame))
    attr = ctypes.create_string_buffer(
        struct.pack("=4IQQII", program, 0, len(frame), 0, bpf.address(data), 0, 1, 0), 72
    )
    bpf.call(TEST_RUN, attr, {})  # type: ignore[arg-type]
    verdict = int(struct.unpack_from("=I", attr, 4)[0])
    assert verdict in (DROP, PASS)
    return verdict


@contextmanager
def lab(*arguments, **options) -> Iterator[Lab]:
    one = Lab(*arguments, **options)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module", params=[4, 8], ids=["seconds", "ns"])
def judge(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """With BAD and BAD6 timed out."""
    need(root=True)
    with lab(value=request.param) as one:
        one.time_out(BAD)
        one.time_out(BAD6)
        yield one


@pytest.mark.parametrize("name", DROPPED_4)
def test_it_drops_the_syn_of_a_timed_out_ipv4_source(judge: Lab, name: str) -> None:
    assert judge.drops(DROPPED_4[name](BAD))
    assert not judge.drops(DROPPED_4[name](GOOD))


@pytest.mark.parametrize("name", DROPPED_6)
def test_it_drops_the_syn_of_a_timed_out_ipv6_source(judge: Lab, name: str) -> None:
    assert judge.drops(DROPPED_6[name](BAD6))
    assert judge.drops(DROPPED_6[name](SAME64))
    assert not judge.drops(DROPPED_6[name](GOOD6))


@pytest.mark.parametrize("name", PASSED_4)
def test_it_passes_what_is_no_syn_to_us_though_its_ipv4_source_is_timed_out(judge: Lab, name: str) -> None:
    assert not judge.drops(PASSED_4[name](BAD))


@pytest.mark.parametrize("name", PASSED_6)
def test_it_passes_what_is_no_syn_to_us_though_its_ipv6_source_is_timed_out(judge: Lab, name: str) -> None:
    assert not judge.drops(PASSED_6[name](BAD6))


@pytest.mark.parametrize("name", DROPPED_4)
def test_an_ipv4_frame_cut_off_before_its_tcp_header_ends_passes(judge: Lab, name: str) -> None:
    frame = DROPPED_4[name](BAD)
    whole = frame.index(tcp()[:13]) + 20
    for length in range(14, len(frame) + 1):
        assert judge.drops(frame[:length]) == (length >= whole), length


@pytest.mark.parametrize("name", [name for name in DROPPED_6 if name != "long"])
def test_an_ipv6_frame_cut_off_before_its_tcp_header_ends_passes(judge: Lab, name: str) -> None:
    frame = DROPPED_6[name](BAD6)
    for length in range(14, len(frame) + 1):
        assert judge.drops(frame[:length]) == (length >= len(frame)), length


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_whatever_bytes_arrive_a_source_that_nobody_timed_out_passes(judge: Lab, data: st.DataObject) -> None:
    frames = [make(GOOD) for make in (*DROPPED_4.values(), *PASSED_4.values())]
    frames += [make(GOOD6) for make in (*DROPPED_6.values(), *PASSED_6.values())]
    frame = bytearray(data.draw(st.sampled_from(frames)))
    for at, byte in data.draw(st.dictionaries(st.integers(0, len(frame) - 1), st.integers(0, 255), max_size=8)).items():
        frame[at] = byte
    held = {ip_address(BAD).packed, ip_address(BAD6).packed[:8]}
    if not any(source in frame for source in held):
        assert not judge.drops(bytes(frame))


# ---- the maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4, 8])
def test_it_drops_until_the_end_and_not_in_the_second_of_the_end(value: int) -> None:
    unit = 1 if value == 4 else SECOND
    with lab(value=value) as one:
        frame = v4()(BAD)
        now = time.clock_gettime_ns(6) // SECOND  # CLOCK_MONOTONIC_COARSE, the program's
        one.write(BAD, now * unit)
        assert not one.drops(frame)
        one.write(BAD, (now + 60) * unit)
        assert one.drops(frame)
        one.write(BAD, 1)
        assert not one.drops(frame)


@pytest.mark.parametrize("value", [4, 8])
def test_preloaded_entries_drop_for_ever(value: int) -> None:
    with lab(value=value) as one:
        for end in (FOR_EVER, 256**value - 1):
            one.write(BAD, end)
            one.write(BAD6, end)
            assert one.drops(v4()(BAD))
            assert one.drops(v6()(BAD6))


@pytest.mark.parametrize("value", [4, 8])
@pytest.mark.parametrize("kind", ["lru_hash", "lpm_trie"])
def test_the_other_kinds_of_map_serve_as_well(kind: str, value: int) -> None:
    with lab(kind, value) as one:
        one.time_out(BAD)
        one.time_out(BAD6)
        assert [one.drops(v4()(source)) for source in (BAD, GOOD)] == [True, False]
        assert [one.drops(v6()(source)) for source in (BAD6, SAME64, GOOD6)] == [True, True, False]


def test_a_trie_drops_networks_of_any_length() -> None:
    with lab("lpm_trie") as one:
        one.write("192.0.2.0", FOR_EVER, 24)
        one.write("2001:db8::", FOR_EVER, 32)
        assert [one.drops(v4()(source)) for source in (BAD, GOOD, "192.0.3.1")] == [True, True, False]
        assert [one.drops(v6()(source)) for source in (BAD6, GOOD6, "2001:db9::1")] == [True, True, False]


def test_an_ipv4_source_behind_a_translator_is_looked_up_as_itself() -> None:
    with lab() as one:
        one.write("64:ff9b::", FOR_EVER)
        assert not one.drops(v6()(EMBEDDED))
        one.time_out(BAD)
        assert one.drops(v6()(EMBEDDED))


@pytest.mark.parametrize("family", [4, 6])
def test_a_family_without_a_map_passes(family: int) -> None:
    with lab(families=(family,)) as one:
        one.write(BAD if family == 4 else BAD6, FOR_EVER)
        assert [one.drops(v4()(BAD)), one.drops(v6()(BAD6))] == [family == 4, family == 6]


# ---- the settings ----------------------------------------------------------------------------------------------------


def test_it_drops_for_every_port_it_was_loaded_with_and_no_other() -> None:
    ports = (1, 65535, *range(5000, 5000 + xdp.MAX_PORTS - 2))
    with lab(options=xdp.Settings(ports, all_packets=False)) as one:
        one.write(BAD, FOR_EVER)
        assert all(one.drops(v4(tcp(port=port))(BAD)) for port in ports)
        assert not any(one.drops(v4(tcp(port=port))(BAD)) for port in (0, 2, 4999, 5000 + xdp.MAX_PORTS - 2, 65534))
        assert one.program.settings() == xdp.Settings(ports, all_packets=False)


def test_all_packets_drops_every_tcp_packet_to_our_port_and_nothing_else() -> None:
    with lab(options=xdp.Settings((PORT,), all_packets=True)) as one:
        one.write(BAD, FOR_EVER)
        one.write(BAD6, FOR_EVER)
        for flags in (0, SYN, SYN | ACK, ACK, RST, FIN | ACK):
            assert one.drops(v4(tcp(flags))(BAD))
            assert one.drops(v6(tcp(flags))(BAD6))
            assert not one.drops(v4(tcp(flags))(GOOD))
        passed = {"SYN-ACK", "data", "RST", "no flags"}
        assert not any(one.drops(PASSED_4[name](BAD)) for name in PASSED_4.keys() - passed)
        assert not any(one.drops(PASSED_6[name](BAD6)) for name in PASSED_6.keys() - passed)
        assert one.program.settings().all_packets


def test_packets_and_bytes_are_counted_on_every_cpu() -> None:
    with lab() as one:
        one.write(BAD, FOR_EVER)
        bad, good = v4(tcp(data=bytes(10)))(BAD), v4()(GOOD)
        expected = dict.fromkeys(xdp.COUNTER_NAMES, 0)
        allowed = os.sched_getaffinity(0)
        try:
            for cpu in sorted(allowed):
                os.sched_setaffinity(0, {cpu})
                one.drops(bad)
                one.drops(good)
                for name, more in zip(xdp.COUNTER_NAMES, (1, len(good), 1, len(bad)), strict=True):
                    expected[name] += more
                assert one.program.counters() == expected
        finally:
            os.sched_setaffinity(0, allowed)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4, 8])
@pytest.mark.parametrize("kind", ["hash", "lpm_trie"])
def test_every_branch_passes_the_verifier_whatever_the_constants_are(
    monkeypatch: pytest.MonkeyPatch, kind: str, value: int
) -> None:
    """Without frozen constants no branch is excluded."""
    monkeypatch.setattr(bpf_load, "freeze_map", lambda _: None)
    with capabilities(CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON), lab(kind, value) as one:
        one.time_out(BAD6)
        assert [one.drops(v6()(source)) for source in (BAD6, GOOD6)] == [True, False]


def test_without_the_rights_it_says_what_is_missing_and_leaves_nothing_open() -> None:
    one = bpf_load.create_map("hash", (4, 4), 16, "tt_test")
    before = os.listdir("/proc/self/fd")
    with capabilities(CAP_BPF), pytest.raises(PermissionError) as caught:
        xdp.load_program({4: one}, SETTINGS)
    assert "no right to load the XDP program: needs root" in caught.value.strerror
    assert os.listdir("/proc/self/fd") == before
    one.close()


def test_a_kernel_that_knows_no_frames_of_several_buffers_gets_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(xdp.KINDS, "native", xdp.KINDS["native"]._replace(flags=1 << 31))  # no kernel's flag
    with lab() as one:
        one.time_out(BAD)
        assert [one.drops(v4()(source)) for source in (BAD, GOOD)] == [True, False]


def test_what_bpftool_loads_without_any_option_is_for_port_5000_and_values_of_4_bytes(tmp_path: Path) -> None:
    need("bpftool", "mount", root=True)
    compiled = compile_xdp(tmp_path)
    place = tmp_path / "bpf"
    place.mkdir()
    with own_namespace("mnt", CLONE_NEWNS):
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)
        for name, key in (("map", "4"), ("map6", "16")):
            words = f"type hash key {key} value 4 entries 70000 name tapetrack_block_map".split()
            subprocess.run(["bpftool", "map", "create", place / name, *words], check=True)
        maps = ["map", "name", "ipv4_seconds", "pinned", "map", "map", "name", "ipv6_seconds", "pinned", "map6"]
        subprocess.run(["bpftool", "prog", "load", compiled, "xdp", *maps], check=True, cwd=place)
        one, six = Map.open(str(place / "map")), Map.open(str(place / "map6"))
        one.update(ip_address(BAD).packed, bytes(4))
        six.update(ip_address(BAD6).packed[:8] + bytes(8), bytes(4))
        path = os.fsencode(place / "xdp")
        program = bpf.call(bpf.OBJ_GET, struct.pack("=QII", bpf.address(path), 0, 0), {})
        assert [run(program, v4()(source)) for source in (BAD, GOOD)] == [DROP, PASS]
        assert [run(program, v6()(source)) for source in (BAD6, SAME64, GOOD6)] == [DROP, DROP, PASS]
        assert run(program, v4(tcp(port=5001))(BAD)) == PASS
        os.close(program)
        one.close()
        six.close()


def compile_xdp(folder: Path) -> Path:
    """The object file that `make bpf` leaves in build/."""
    generate = load_generator()
    need(generate.CLANG)
    compiled = folder / "tt_xdp.bpf.o"
    compiled.write_bytes(generate.compile_object(generate.HERE / "tt_xdp.bpf.c"))
    return compiled
