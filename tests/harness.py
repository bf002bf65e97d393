"""A real server for the tests: the loop in a thread of this process, on a free port of the loopback network.

`Running` starts it, hands out connections from any loopback source, waits for what the loop does, and at its end
checks that nothing is left: no connection, no buffer, no entry in a queue.
"""

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tt import config, keys, log
from tt._core import Server, TimeoutTable
from tt.client import Client
from tt.dispatch import Dispatcher, Operation
from tt.guard import Guard
from tt.noise import Transport, consume_welcome, create_hello
from tt.serve import Application, open_listeners
from tt.wire import DATA, HELLO, Hello, encode_hello, header

HOST = "127.0.0.1"
PATIENCE = 10.0  # s: the longest that a test waits for something that is to happen


def until(what: str, happened: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """What `happened` returns once that is true; looked at often, so that no test waits longer than needed."""
    end = time.monotonic() + patience
    pause = threading.Event()
    while not (result := happened()):
        assert time.monotonic() < end, f"waited {patience} s in vain: {what}"
        pause.wait(0.001)
    return result


class Events(logging.Handler):
    """The events that the server logged: dicts with `words` and the fields."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append({"words": record.getMessage(), **getattr(record, "fields", {}), "failure": record.exc_info})

    def of(self, words: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["words"] == words]


class Running:
    """A server with the given options; use it in a `with` statement."""

    def __init__(
        self, data: Path, operations: Mapping[str, Operation] | None = None, *, places: int = 1000, **options: Any
    ) -> None:
        settings = config.load(None, {}, {"listen": [f"{HOST}:0"], "data": str(data), **options})
        data.mkdir(exist_ok=True)
        self.events = Events()
        self.key, _ = keys.create_or_load(data)
        self.settings = settings
        self._null = os.open(os.devnull, os.O_WRONLY)
        handler = log.Handler(self._null, limit=settings.log_buffer)
        self.table = TimeoutTable(settings.table_size, ipv6_prefix=settings.ipv6_prefix, now=time.monotonic_ns())
        self.guard = Guard(settings, self.table, data / "timeouts", (), handler)
        self.guard.restore()
        self.dispatcher = Dispatcher([self.key], operations or {})
        self.application = Application(settings, self.dispatcher, self.guard)
        listeners = open_listeners(settings)
        self.addresses = [listener.getsockname() for listener in listeners]
        self.port = self.addresses[0][1]
        self.server = Server(
            [listener.detach() for listener in listeners], places, self.table, self.application, settings,
            exempt=self.guard.exempt,
        )  # fmt: skip
        self.application.serve(self.server)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._open: list[socket.socket] = []

    # ---- the peer's side --------------------------------------------------------------------------------------------

    def connect(self, source: str = "127.0.0.2", *, host: str = HOST, timeout: float = PATIENCE) -> socket.socket:
        """A connection from a loopback address; closed at the end of the test."""
        peer = socket.create_connection((host, self.port), timeout, (source, 0))
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.append(peer)
        return peer

    def is_dropped(self, source: str = "127.0.0.2") -> bool:
        """Whether a new connection from that source is closed at once, without a byte sent."""
        try:
            return ended(self.connect(source, timeout=0.5)) == b""
        except ConnectionResetError:  # the reset was here before connect() returned
            return True
        except TimeoutError:
            return False

    def handshake(self, source: str = "127.0.0.2", *, host: str = HOST) -> tuple[socket.socket, Transport]:
        """A connection that has its WELCOME."""
        peer = self.connect(source, host=host)
        message, pending = create_hello(self.key.public, encode_hello(Hello("test", "0")))
        peer.sendall(header(HELLO, len(message)) + message)
        frame = self.read_frame(peer)
        _, transport = consume_welcome(pending, frame[8:])
        return peer, transport

    @staticmethod
    def read_frame(peer: socket.socket) -> bytes:
        """One whole frame, header first; fails when the connection ends before."""
        head = read_exactly(peer, 8)
        return head + read_exactly(peer, struct.unpack(">I", head[4:])[0])

    def client(self, source: str = "127.0.0.2", **options: Any) -> Client:
        """The client library, from a loopback address."""
        return Client(HOST, self.port, key=self.key.public, source=source, **options)

    def seal(self, transport: Transport, plaintext: bytes) -> bytes:
        """A DATA frame."""
        head = header(DATA, len(plaintext) + 16)
        return head + transport.seal(head, plaintext)

    # ---- the server's side ------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        return self.server.counters()

    def closed(self, reason: str) -> int:
        return int(self.counters()["closed"][reason])

    def timed_out(self, source: str = "127.0.0.2") -> dict[str, Any] | None:
        """The logged time-out of a source, or None."""
        return next((event for event in self.events.of("timed out") if event["source"] == source), None)

    def await_timed_out(self, source: str = "127.0.0.2") -> dict[str, Any]:
        return until(f"time-out of {source}", lambda: self.timed_out(source))

    def await_closed(self, reason: str, count: int = 1) -> None:
        until(f"{count} closed as {reason}: {self.counters()}", lambda: self.closed(reason) >= count)

    def wake(self) -> None:
        """Make the loop turn at once, as any connection does."""
        with suppress(OSError):  # a stopping server resets it, or is gone
            socket.create_connection((HOST, self.port), PATIENCE, ("127.255.255.254", 0)).close()

    # ---- start and end ----------------------------------------------------------------------------------------------

    def __enter__(self) -> "Running":
        log.LOGGER.addHandler(self.events)
        log.LOGGER.setLevel(logging.INFO)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for peer in self._open:
                peer.close()
            if kind is None:
                until(f"no connection left: {self.counters()}", self._nobody)
        finally:
            self.server.stop()
            self.wake()
            self._thread.join(PATIENCE)
            log.LOGGER.removeHandler(self.events)
            os.close(self._null)
        if kind is None:
            assert not self._thread.is_alive(), "the loop did not stop"
            assert set(self.server.waiting().values()) == {0}, self.server.waiting()
            failures = [event for event in self.events.all if event["failure"]]
            assert not failures, f"the server failed: {failures}"

    def _nobody(self) -> bool:
        counters = self.counters()
        return not any(counters["connections"].values())


def read_exactly(peer: socket.socket, size: int) -> bytes:
    """`size` bytes; fails when the connection ends before."""
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        assert part, f"the connection ended after {len(data)} of {size} bytes"
        data += part
    return data


def ended(peer: socket.socket) -> bytes:
    """What still arrives until the connection ends, by an end of stream or a reset."""
    data = b""
    try:
        while part := peer.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data
