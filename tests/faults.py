"""What makes a real server process fail: calls, memory, clock, disk (faults.c); and the honest client beside it."""

import mmap
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import HOST
from process import Process, plain_environment

from tt import keys
from tt.client import Client, TapeTrackError

NS = 10**9
LONG = 8.0  # s that an honest client may wait where the machine is busy; who is held up waits for a deadline, or ever
CALLS = (
    "extension",
    "interpreter",
    "accept",
    "epoll_ctl",
    "send",
    "recv",
    "thread",
)  # the order of `enum kind` in faults.c


def client(server: Process, from_: str = "127.0.0.1", timeout: float = 30) -> Client:
    public = keys.from_text((server.place / "data/server.pub").read_text())
    return Client(HOST, server.port, key=public, source=from_, timeout=timeout)


class Faults:
    """The shared memory of faults.c: which calls fail, how the wall clock is off, how slow the disk is."""

    LAYOUT = struct.Struct(f"={2 * len(CALLS)}Qqq")

    def __init__(self, place: Path) -> None:
        library = place / "faults.so"
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("faults.c")]
        subprocess.run(command, check=True, env=plain_environment())
        self._file = (place / "faults").open("w+b")
        self._file.truncate(self.LAYOUT.size)
        self._memory = mmap.mmap(self._file.fileno(), self.LAYOUT.size)
        before = [path for path in (os.environ.get("LD_PRELOAD"),) if path]  # a sanitizer's must be the first
        self.environ = {"FAULTS": self._file.name, "LD_PRELOAD": ":".join([*before, str(library)])}

    def every(self, call: str, number: int) -> None:
        """From now on each so-manieth of these calls fails; 0: none."""
        struct.pack_into("=Q", self._memory, 8 * CALLS.index(call), number)

    def failed(self, call: str) -> int:
        """How many of these calls have failed."""
        return int(struct.unpack_from("=Q", self._memory, 8 * (len(CALLS) + CALLS.index(call)))[0])

    def step(self, seconds: int) -> None:
        """The wall clock is off by this."""
        struct.pack_into("=q", self._memory, 16 * len(CALLS), seconds * NS)

    def slow(self, seconds: float) -> None:
        """fsync and fdatasync take so much longer."""
        struct.pack_into("=q", self._memory, 16 * len(CALLS) + 8, int(seconds * NS))

    def close(self) -> None:
        self._memory.close()
        self._file.close()


@contextmanager
def beside(work: Callable[[], None], over: threading.Event) -> Iterator[None]:
    """Work in a thread, which looks at `over`: that is set at the end of the block."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def pinging(server: Process, from_: str = "127.0.0.1") -> Iterator[list[float]]:
    """An honest client that pings all the while on one connection; the seconds of each. Fails with the first error."""
    seconds: list[float] = []
    failures: list[TapeTrackError] = []
    over = threading.Event()

    def ping() -> None:
        try:
            with client(server, from_) as honest:
                while not over.wait(0.005):
                    seconds.append(honest.ping().seconds)
        except TapeTrackError as error:
            failures.append(error)

    with beside(ping, over):
        yield seconds
    if failures:
        raise failures[0]
    assert seconds
