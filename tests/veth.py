"""Two network namespaces joined by a veth pair, and a BPF file system at /sys/fs/bpf, for this thread alone.

This thread is in the server's namespace; the client's is entered for the moment in which a socket is made, which keeps
it.  Neither has a name, so all of it goes with the test, however that ends.
"""

import ctypes
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_bpf import LIBC, own_namespace

from tt import bpf, bpf_load, xdp

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
INGRESS, EGRESS = 46, 47  # enum bpf_attach_type
SERVER, CLIENT, OTHER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
SERVER6, CLIENT6, OTHER6 = "fd77::1", "fd77::2", "fd77:0:0:1::2"


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


class Pair:
    """`vs` is the server's end, `vc` the client's."""

    def __init__(self, client: int) -> None:
        self._client = client
        self._links: list[int] = []
        self._server = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        sh("ip link set lo up")
        sh(f"ip link add vs type veth peer name vc netns /proc/{os.getpid()}/fd/{client}")
        self._addresses("vs", SERVER, SERVER6)
        with self.in_client():
            sh("ip link set lo up")
            self._addresses("vc", CLIENT, OTHER, CLIENT6, OTHER6)

    def tag(self, *kinds: int) -> None:
        """Have all that the client sends in a VLAN, or in one within another, the innermost first, until behind XDP.

        Done by two BPF programs, since not every kernel has VLAN interfaces.  A veth hands on the outermost tag beside
        the frame, as a card does that strips it, and the others in it.
        """
        push = b"".join(mov(2, socket.htons(kind)) + mov(3, 7) + restore(1) + call(18) for kind in kinds)
        pop = (restore(1) + call(19)) * len(kinds)
        with self.in_client():
            self._links.append(tcx("vc", EGRESS, push))
        self._links.append(tcx("vs", INGRESS, pop))

    def _addresses(self, interface: str, *addresses: str) -> None:
        for address in addresses:
            sh(f"ip address add {address}/{'32 nodad' if ':' in address else '24'} dev {interface}")
        sh(f"ip link set {interface} up")

    @contextmanager
    def in_client(self) -> Iterator[None]:
        """This thread, and what it starts meanwhile, in the client's namespace."""
        assert LIBC.setns(self._client, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert LIBC.setns(self._server, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def begin(self, source: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A client's socket on its way to a port of the server: the SYN is sent."""
        with self.in_client():
            peer = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, kind)
        peer.setblocking(False)
        peer.bind((source, 0))
        peer.connect_ex((SERVER6 if ":" in source else SERVER, port))
        return peer

    def close(self) -> None:
        for descriptor in (self._server, *self._links):
            os.close(descriptor)


def mov(register: int, number: int) -> bytes:
    return struct.pack("<BBhi", 0xB7, register, 0, number)


def restore(register: int) -> bytes:
    """From R6, which keeps the packet."""
    return struct.pack("<BBhi", 0xBF, 6 << 4 | register, 0, 0)


def call(helper: int) -> bytes:
    """18: bpf_skb_vlan_push; 19: bpf_skb_vlan_pop."""
    return struct.pack("<BBhi", 0x85, 0, 0, helper)


def tcx(interface: str, direction: int, code: bytes) -> int:
    """A link that runs this on what the interface takes in or sends, and lets it go on."""
    keep, leave = struct.pack("<BBhi", 0xBF, 1 << 4 | 6, 0, 0), mov(0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    program = bpf_load._load_instructions(bpf_load.Kind(3, "tt_test", "test's program", "root"), keep + code + leave)
    try:
        attr = struct.pack("=4I", program, socket.if_nametoindex(interface), direction, 0)
        return bpf.call(xdp.LINK_CREATE, attr, {})
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this kernel has no tcx links (Linux 6.6)")
    finally:
        os.close(program)


def is_open(peer: socket.socket) -> bool:
    """Whether the handshake is done (TCP_INFO's first byte)."""
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def segments_in() -> int:
    """The TCP segments that this namespace's stack received, for IPv4 and IPv6."""
    head, values = [
        line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if "Tcp:" in line
    ]
    return int(values[head.index("InSegs")])


@contextmanager
def pair() -> Iterator[Pair]:
    """Both namespaces and the BPF file system, for as long as the block runs."""
    with own_namespace("net", CLONE_NEWNET):
        client = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with own_namespace("net", CLONE_NEWNET), own_namespace("mnt", CLONE_NEWNS):
                sh("mount --make-rprivate / && mount -t bpf bpf /sys/fs/bpf")
                both = Pair(client)
                try:
                    yield both
                finally:
                    both.close()
        finally:
            os.close(client)
