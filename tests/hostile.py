"""Hostile peers in processes of their own: a server may hold as many connections as one process has descriptors.

    hostile.py PORT FIRST SOURCES COUNT DOES [HEX]     one crowd: COUNT connections from SOURCES sources from FIRST on

`DOES` is one of the functions below.  A crowd says one line when all of it stands, acts once for each line that it is
told, and ends with its standard input, when it says what came of it.  Knows nothing of the server but its port.
"""

import contextlib
import os
import resource
import selectors
import socket
import struct
import subprocess
import sys
from types import TracebackType

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets, and leaves no port behind


def source(number: int) -> str:
    """The address of a source, one of 4 million."""
    return f"127.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


class Crowd:
    """A process of hostile peers; use it in a `with` statement, at whose end it is gone."""

    def __init__(self, port: int, first: int, sources: int, count: int, *, does: str, data: bytes = b"") -> None:
        words = [port, first, sources, count, does, data.hex()]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def over(self) -> bool:
        """Whether it has done all that it had to do by itself."""
        return self._process.poll() is not None

    def await_line(self) -> str:
        """What it says next: that it stands, or that it has acted."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the crowd has ended"
        return line

    def act(self) -> None:
        """Once more, as soon as it can."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def end(self) -> int:
        """End it; the number that it says last."""
        return int(self._process.communicate(timeout=120)[0].split()[-1])


# ---- the process ----------------------------------------------------------------------------------------------------


def connect(port: int, number: int) -> socket.socket:
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.bind((source(number), 0))
    peer.settimeout(60)
    with contextlib.suppress(ConnectionError):  # reset at once
        peer.connect(("127.0.0.1", port))
    peer.setblocking(False)
    return peer


def silent(port: int, sources: range, count: int, _data: bytes) -> int:
    """Connect and say nothing."""
    peers = [connect(port, sources[number % len(sources)]) for number in range(count)]
    print("silent", flush=True)
    sys.stdin.read()
    return len(peers)


def slow(port: int, sources: range, count: int, data: bytes) -> int:
    """One byte of `data` at once, and one more each time.  Ends with the number of connections still open."""
    peers = [connect(port, sources[number % len(sources)]) for number in range(count)]
    for at in range(len(data)):
        for peer in peers[:]:
            try:
                peer.send(data[at : at + 1])
            except ConnectionError:
                peers.remove(peer)
        print("sent", flush=True)
        if not sys.stdin.readline():
            break
    return len(peers)


def once(port: int, sources: range, count: int, data: bytes) -> int:
    """Connect, send, read to the end, one after the other.  Ends with the number of those who got an answer."""
    answered = 0
    for number in range(count):
        with connect(port, sources[number % len(sources)]) as peer, contextlib.suppress(OSError):
            peer.send(data)
            peer.settimeout(60)
            answered += bool(peer.recv(1))
    print("done", flush=True)
    return answered


def leave(port: int, sources: range, count: int, data: bytes) -> int:
    """Connect, send and reset, one after the other."""
    for number in range(count):
        with connect(port, sources[number % len(sources)]) as peer, contextlib.suppress(OSError):
            peer.send(data)
    print("done", flush=True)
    return count


def flood(port: int, sources: range, count: int, data: bytes) -> int:
    """Keep `count` connections busy: send one of the frames of `data`, at the first answer begin anew.

    Ends with the number of answers.
    """
    answers, at = 0, 0
    frames = []
    while data:
        size = 8 + int.from_bytes(data[4:8])
        frames.append(data[:size])
        data = data[size:]
    selector = selectors.DefaultSelector()

    def begin() -> None:
        nonlocal at
        at += 1
        peer = connect(port, sources[at % len(sources)])
        with contextlib.suppress(OSError):
            peer.send(frames[at % len(frames)])
        selector.register(peer, selectors.EVENT_READ)

    for _ in range(count):
        begin()
    print("flooding", flush=True)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return answers
            assert isinstance(key.fileobj, socket.socket)
            with contextlib.suppress(OSError):
                answers += bool(key.fileobj.recv(1))
            selector.unregister(key.fileobj)
            key.fileobj.close()
            begin()


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port, first, sources, count = map(int, sys.argv[1:5])
    does = {"silent": silent, "slow": slow, "once": once, "leave": leave, "flood": flood}[sys.argv[5]]
    os.nice(1)  # the honest are to be measured, not the hostile
    print(does(port, range(first, first + sources), count, bytes.fromhex(sys.argv[6])), flush=True)
    os._exit(0)  # thousands of sockets at once


if __name__ == "__main__":
    main()
