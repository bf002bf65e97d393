"""Private namespaces for tests on the real kernel: a host with a BPF file system of its own, and a neighbour.

    host        10.55.0.1  2001:db8::1       runs the server; /sys/fs/bpf is seen there alone
    neighbour   10.55.0.2 .. 10.55.0.5       where the peers are; IPv6: NEAR, NEAR_TOO (one /64) and FAR

Both are joined by a veth pair and go with the test.  At its end nothing may be pinned but the maps that the test made,
and no program that one of its servers loaded may be left in the kernel.
"""

import ctypes
import errno
import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import until
from process import TT, Process, need, plain_environment

from tt import bpf, keys
from tt._core import source_text
from tt.bpf import Map
from tt.noise import create_hello
from tt.wire import HELLO, Hello, encode_hello, header

HOST, HOST6 = "10.55.0.1", "2001:db8::1"
NEIGHBOURS = tuple(f"10.55.0.{number}" for number in range(2, 6))
NEAR, NEAR_TOO, FAR = "2001:db8:a::2", "2001:db8:a::3", "2001:db8:b::2"
PORT = 5000
MAP, MAP6 = "/sys/fs/bpf/tapetrack_block_map", "/sys/fs/bpf/tapetrack_block_map6"
CLOSED_PORT = 1  # of the host
SYN_SENT = 2  # TCP_INFO's first byte
CLONE_NEWNET = 0x40000000
PROG_GET_FD_BY_ID = 13
LIBC = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network and a mount namespace, held by a process that does nothing."""

    def __init__(self, *commands: str) -> None:
        script = "; ".join(["ip link set lo up", *commands, "echo ready", "exec sleep infinity"])
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec", script], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._holder.pid
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.wrap = ("nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt")

    def run(self, *command: str, code: int = 0) -> str:
        """What a command prints there, which must end with that exit code."""
        done = subprocess.run(
            [*self.wrap, *command], env=plain_environment(), capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == code, done
        return done.stdout

    @contextmanager
    def network(self) -> Iterator[None]:
        """This thread in that network; sockets made here stay there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            assert LIBC.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert LIBC.setns(before, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            os.close(there)
            os.close(before)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Lab:
    """The two namespaces, the maps pinned in the first, and servers there; use it in a `with` statement."""

    def __init__(self, place: Path) -> None:
        need("unshare", "nsenter", "ip", "mount", "bpftool", root=True)
        self.place = place
        self._maps: dict[str, Map] = {}
        self._programs: set[int] = set()
        self.neighbour = Namespace()
        self.host = Namespace(
            "mount -t bpf bpf /sys/fs/bpf",
            f"ip link add veth0 type veth peer name veth0 netns {self.neighbour.pid}",
            *self._addresses(HOST, HOST6),
        )
        self.neighbour.run("sh", "-ec", "; ".join(self._addresses(*NEIGHBOURS, NEAR, NEAR_TOO, FAR)))

    @staticmethod
    def _addresses(*addresses: str) -> list[str]:
        given = [f"ip address add {a}" + ("/128 dev veth0 nodad" if ":" in a else "/24 dev veth0") for a in addresses]
        return [*given, "ip link set veth0 up", "ip -6 route add 2001:db8::/32 dev veth0"]

    # ---- maps -------------------------------------------------------------------------------------------------------

    def make_map(self, path: str = MAP, kind: str = "hash", key: int = 4, value: int = 4, entries: int = 1024) -> Map:
        """A pinned map, as bpftool makes it; ours is a second descriptor of it."""
        flags = ("flags", "1") if kind == "lpm_trie" else ()
        sizes = ("key", str(key), "value", str(value), "entries", str(entries))
        self.host.run("bpftool", "map", "create", path, "type", kind, *sizes, "name", "tapetrack_block_map", *flags)
        return self.open_map(path)

    def open_map(self, path: str) -> Map:
        self._maps[path] = Map.open(f"/proc/{self.host.pid}/root{path}")
        return self._maps[path]

    # ---- the server -------------------------------------------------------------------------------------------------

    def serve(self, *arguments: str, wrap: tuple[str, ...] = (), place: Path | None = None, **options: Any) -> Process:
        """A server in the host; on the default listeners, PORT of both families."""
        return Process(
            place or self.place,
            *arguments,
            wrap=(*self.host.wrap, *wrap),
            listen=options.pop("listen", None),
            **options,
        )

    def note_programs(self, server: Process) -> set[int]:
        """The kernel programs that a server holds; at the end of the test they must be gone."""
        found = set()
        for file in Path(f"/proc/{server.pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):
                found |= {int(number) for number in re.findall(r"^prog_id:\s*(\d+)", file.read_text(), re.M)}
        self._programs |= found
        return found

    def tt(self, server: Process, *words: str, code: int = 0) -> str:
        """What `tt` prints, its messages behind its data; what it changed is in the kernel's maps by then."""
        done = subprocess.run(
            [TT, *words, "--data", str(server.place / "data")],
            env=server.environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == code, done
        self.ask(server)
        return done.stdout + done.stderr

    def ask(self, server: Process, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """The last line of the answer to each, straight from the control socket.

        The loop answers in the middle of a turn and writes the maps at its end, so one more request ends all: it is
        answered in a later turn.
        """
        requests = (*requests, {"do": "status"})
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(str(server.place / "data/control.sock"))
            with control.makefile("rwb") as stream:
                answers = []
                for at in range(0, len(requests), 100):  # more at once, and both sides would wait to be read
                    some = requests[at : at + 100]
                    stream.write(b"".join(json.dumps(request).encode() + b"\n" for request in some))
                    stream.flush()
                    answers += [json.loads(stream.readline()) for _ in some]
                return answers[:-1]

    def bans(self, server: Process) -> dict[str, dict[str, Any]]:
        """`tt bans list --json`, by source."""
        items = [json.loads(line) for line in self.tt(server, "bans", "list", "--json").splitlines()]
        return {item["source"]: item for item in items}

    # ---- peers in the neighbour -------------------------------------------------------------------------------------

    def connect(self, source: str, port: int = PORT) -> socket.socket:
        """A connection to the host."""
        peer = self._unconnected(source)
        try:
            peer.settimeout(10)
            peer.connect((HOST6 if ":" in source else HOST, port))
        except BaseException:
            peer.close()
            raise
        return peer

    def _unconnected(self, source: str) -> socket.socket:
        with self.neighbour.network():
            peer = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        peer.bind((source, 0))
        return peer

    def _knock(self, source: str, port: int) -> socket.socket:
        """A socket whose SYN has been judged by the host's kernel: it is SYN_SENT still where no answer came.

        A second SYN, to a port that nobody has, is always refused.  Both are sent on one processor, which handles them
        and their answers in that order: who has the second answer has the first one, if there is any.
        """
        peer, behind = self._unconnected(source), self._unconnected(source)
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            for knocking, to in ((peer, port), (behind, CLOSED_PORT)):
                knocking.setblocking(False)
                knocking.connect_ex((HOST6 if ":" in source else HOST, to))
            refused = errno.ECONNREFUSED
            until("the refusal", lambda: behind.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == refused)
        except BaseException:
            peer.close()
            raise
        finally:
            os.sched_setaffinity(0, allowed)
            behind.close()
        return peer

    def meet(self, server: Process, source: str, port: int = PORT) -> str:
        """What becomes of an honest client: "silent" (no answer to its SYN), "closed" at once, or "served"."""
        public = keys.from_text((server.place / "data/server.pub").read_text())
        message, _ = create_hello(public, encode_hello(Hello("test", "0")))
        try:
            with self._knock(source, port) as peer:
                if peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == SYN_SENT:
                    return "silent"
                peer.settimeout(10)
                peer.sendall(header(HELLO, len(message)) + message)
                return "served" if peer.recv(1) else "closed"
        except ConnectionError:
            return "closed"

    def misbehave(self, server: Process, source: str, port: int = PORT, ipv6_prefix: int = 64) -> None:
        """Speak HTTP from there; returns once the server has said, again, that this source is timed out."""
        line = f" timed out source={source_text(source, ipv6_prefix)} "
        before = server.log.count(line)
        with self.connect(source, port) as peer, suppress(ConnectionResetError):
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert peer.recv(1) == b""
        until(f"the time-out of {source}", lambda: server.log.count(line) > before)

    # ---- end --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                pinned = {f"/sys/fs/bpf/{name}" for name in self.host.run("ls", "/sys/fs/bpf").split()}
                assert pinned - {"/sys/fs/bpf/maps.debug", "/sys/fs/bpf/progs.debug"} == self._maps.keys()
                until("the end of all programs", lambda: not any(map(program_is_loaded, self._programs)))
        finally:
            for one in self._maps.values():
                one.close()
            self.host.close()
            self.neighbour.close()


def program_is_loaded(number: int) -> bool:
    """Whether the kernel has a program of that id."""
    try:
        os.close(bpf.call(PROG_GET_FD_BY_ID, struct.pack("=I", number), {}, "a program"))
    except FileNotFoundError:
        return False
    return True


def v4(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET, address)


def v6(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


def lpm(address: str, prefix: int) -> bytes:
    """A key of an LPM trie."""
    return struct.pack("=I", prefix) + (v6 if ":" in address else v4)(address)


def seconds(from_now: float) -> bytes:
    """A value of 4 bytes: an end so many s from now, rounded up."""
    return struct.pack("=I", -int(-(time.monotonic() + from_now) // 1))


def until_past(end: int) -> None:
    """Wait for a moment of CLOCK_MONOTONIC, ns, and 10 ms more: one tick of the kernel's coarse clock at 100 Hz."""
    until("the end of a time-out", lambda: time.monotonic_ns() > end + 10_000_000)
