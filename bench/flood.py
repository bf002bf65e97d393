"""SYNs from 65,536 sources, made inside the kernel and taken up as if they had just arrived: 36 ns each.

An ordinary packet sender costs more than what is measured and hides it.  BPF_PROG_TEST_RUN with live frames (Linux
5.18) runs a small XDP program on each frame and, where that passes it, hands the frame to the network stack as received
on an interface; so one processor does all the work, and its time is the figure.
It must not know who listens.
"""

import ctypes
import os
import socket
import struct
import time

from bench.kit import NotMeasuredError, output_of
from tt import bpf

ADDRESS = "10.77.0.1"  # ours on the interface
NETWORK = "10.78.0.0"  # /16: where the SYNs come from
INTERFACE = "tt_in"
PROG_LOAD, PROG_TEST_RUN = 5, 10  # commands of bpf(2)
XDP, LIVE_FRAMES = 6, 2  # BPF_PROG_TYPE_XDP, BPF_F_TEST_XDP_LIVE_FRAMES
DROP, PASS = 1, 2  # verdicts of an XDP program
GET_PRANDOM = 7  # the helper bpf_get_prandom_u32
FRAMES_AT_ONCE = 64

# Offsets in the frame of what differs, and of the fields that take the complement, so that both checksums stay right
# without being computed: the low half of the source address against the IP id and the sequence number, the source port
# against the urgent pointer.
_SOURCE_LOW, _IP_ID, _SEQUENCE_LOW, _SOURCE_PORT, _URGENT = 28, 18, 40, 34, 52
_FRAME_BYTES = 54


def _sum(data: bytes | bytearray) -> int:
    """The Internet checksum of an even number of bytes (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame_to(mac: bytes, port: int) -> bytes:
    """A SYN from NETWORK's first address and port 0, with the complements in place."""
    source, target = socket.inet_aton(NETWORK), socket.inet_aton(ADDRESS)
    ip = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0xFFFF, 0, 64, socket.IPPROTO_TCP, 0, source, target))
    struct.pack_into("!H", ip, 10, _sum(ip))
    tcp = bytearray(struct.pack("!HHIIBBHHH", 0, port, 0x1234FFFF, 0, 5 << 4, 2, 65535, 0, 0xFFFF))
    struct.pack_into("!H", tcp, 16, _sum(source + target + struct.pack("!HH", socket.IPPROTO_TCP, 20) + tcp))
    return mac + bytes.fromhex("020000000009") + b"\x08\x00" + bytes(ip + tcp)


def instruction(code: int, to: int = 0, of: int = 0, offset: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBhi", code, of << 4 | to, offset, number)


def program_of(verdict: int) -> bytes:
    """Gives each frame a random source address and port; r6 the context, r7 the address, r8 the port, r2 the frame."""
    load4, move, set_, and_, shift, xor, store2 = 0x61, 0xBF, 0xB7, 0x57, 0x77, 0xA7, 0x6B
    add, skip_if_over, call, leave = 0x07, 0x2D, 0x85, 0x95

    def store(register: int, *offsets: int) -> list[bytes]:
        return [instruction(store2, 2, register, offset) for offset in offsets]

    change = [
        *store(7, _SOURCE_LOW), instruction(xor, 7, number=0xFFFF), *store(7, _IP_ID, _SEQUENCE_LOW),
        *store(8, _SOURCE_PORT), instruction(xor, 8, number=0xFFFF), *store(8, _URGENT),
    ]  # fmt: skip
    return b"".join(
        [
            instruction(move, 6, 1),
            instruction(call, number=GET_PRANDOM),
            instruction(move, 7, 0),
            instruction(move, 8, 0),
            instruction(and_, 7, number=0xFFFF),
            instruction(shift, 8, number=16),
            instruction(and_, 8, number=0xFFFF),
            instruction(load4, 2, 6, 0),  # the frame's begin
            instruction(load4, 4, 6, 4),  # and its end
            instruction(move, 3, 2),
            instruction(add, 3, number=_FRAME_BYTES),
            instruction(skip_if_over, 3, 4, len(change)),
            # All of it for every frame: the kernel hands out a page again as the last run left it.
            *change,
            instruction(set_, 0, number=verdict),
            instruction(leave),
        ]
    )


class Flood:
    """An interface of this network namespace on which SYNs to a port arrive.  `verdict` DROP: the generator alone."""

    def __init__(self) -> None:
        output_of("ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", "tt_out")
        for words in (
            ("addr", "add", f"{ADDRESS}/24", "dev", INTERFACE),
            ("link", "set", INTERFACE, "up"),
            ("link", "set", "tt_out", "up"),
            ("route", "add", f"{NETWORK}/16", "via", "10.77.0.2"),
        ):
            output_of("ip", *words)
        self._index = socket.if_nametoindex(INTERFACE)
        said = output_of("ip", "-o", "link", "show", INTERFACE)
        self._mac = bytes.fromhex(said.split("link/ether ")[1].split()[0].replace(":", ""))

    def close(self) -> None:
        output_of("ip", "link", "delete", INTERFACE)

    def ns_per_packet(self, port: int, packets: int, verdict: int = PASS) -> float:
        """CPU time for making one SYN and all that the stack does with it."""
        program = self._load(verdict)
        try:
            self._run(program, port, FRAMES_AT_ONCE)  # makes the pages
            begun = time.thread_time_ns()
            self._run(program, port, packets)
            return (time.thread_time_ns() - begun) / packets
        finally:
            os.close(program)

    @staticmethod
    def _load(verdict: int) -> int:
        code, license_text = program_of(verdict), b"GPL\0"
        attr = struct.pack("=IIQQ", XDP, len(code) // 8, bpf.address(code), bpf.address(license_text))
        return bpf.call(PROG_LOAD, attr, {}, "generator")

    def _run(self, program: int, port: int, packets: int) -> None:
        frame = frame_to(self._mac, port)
        context = struct.pack("=6I", 0, len(frame), 0, self._index, 0, 0)  # struct xdp_md: data, end, meta, interface
        data, about = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(context, len(context))
        attr = struct.pack(
            "=IIIIQQIIIIQQIII", program, 0, len(frame), 0, bpf.address(data), 0, packets, 0, len(context), 0,
            bpf.address(about), 0, LIVE_FRAMES, 0, FRAMES_AT_ONCE,
        )  # fmt: skip
        try:
            bpf.call(PROG_TEST_RUN, attr, {}, "live frames")
        except OSError as error:
            raise NotMeasuredError(f"live frames need Linux 5.18: {error.strerror}") from None
