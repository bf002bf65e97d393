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
from tt.dispatch import Dispatcher, Operation, Session
from tt.guard import Guard
from tt.listeners import open_listeners
from tt.noise import PendingClient, Transport, consume_welcome, create_hello
from tt.serve import Application
from tt.wire import DATA, HELLO, Hello, Reply, Request, decode_replies, encode_hello, encode_requests, header

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


def log_in(session: Session, _arguments: object) -> None:
    session.log_in()


LOGIN: Mapping[str, Operation] = {"login": log_in}  # an operation that lets everybody in


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
    """A server with the given options; use it in a `with` statement.

    `send_buffer` bounds what the kernel takes from the server for a connection, in bytes: else it may be 4 MiB, and no
    reply of a test has to wait.
    """

    def __init__(
        self,
        data: Path,
        operations: Mapping[str, Operation] | None = None,
        *,
        places: int = 1000,
        send_buffer: int | None = None,
        **options: Any,
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
        if send_buffer is not None:
            for listener in listeners:  # what they accept inherits it
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
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

    def connect(
        self, source: str = "127.0.0.2", *, host: str = HOST, timeout: float = PATIENCE, buffer: int | None = None
    ) -> socket.socket:
        """A connection from a loopback address; closed at the end of the test.  `buffer`: bytes to receive into."""
        peer = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._open.append(peer)
        peer.settimeout(timeout)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        peer.bind((source, 0))
        peer.connect((host, self.port))
        return peer

    def is_dropped(self, source: str = "127.0.0.2", *, host: str = HOST) -> bool:
        """Whether a new connection from that source is closed at once; else it gets its WELCOME."""
        try:
            peer = self.connect(source, host=host)
            peer.sendall(self.hello()[0])
            return not peer.recv(1)
        except ConnectionError:
            return True
        finally:
            self._open.pop().close()  # a test may ask thousands of times

    def hello(self, public: bytes | None = None) -> tuple[bytes, PendingClient]:
        """A HELLO frame, for this server or for the one with that public key."""
        message, pending = create_hello(public or self.key.public, encode_hello(Hello("test", "0")))
        return header(HELLO, len(message)) + message, pending

    def handshake(self, source: str = "127.0.0.2", **options: Any) -> tuple[socket.socket, Transport]:
        """A connection that has its WELCOME; `options` are connect()'s."""
        peer = self.connect(source, **options)
        hello, pending = self.hello()
        peer.sendall(hello)
        frame = self.read_frame(peer)
        _, transport = consume_welcome(pending, frame[8:])
        return peer, transport

    def user(self, source: str = "127.0.0.2", **options: Any) -> tuple[socket.socket, Transport]:
        """A connection whose user has logged in, on a server that offers LOGIN."""
        peer, transport = self.handshake(source, **options)
        (reply,) = self.ask(peer, transport, "login")
        assert reply.error is None
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

    def read_plaintext(self, peer: socket.socket, transport: Transport) -> bytes:
        """What the next DATA frame holds."""
        frame = self.read_frame(peer)
        return transport.open(frame[:8], frame[8:])

    def ask(self, peer: socket.socket, transport: Transport, *operations: str) -> list[Reply]:
        """The replies to requests, without arguments, that fit into one frame; their ids count from 1."""
        requests = [Request(number, operation) for number, operation in enumerate(operations, 1)]
        peer.sendall(self.seal(transport, b"\0" + encode_requests(requests)))
        return decode_replies(self.read_plaintext(peer, transport)[1:])

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
        host = self.addresses[0][0]
        source = None if ":" in host else ("127.255.255.254", 0)  # one that no test times out
        with suppress(OSError):  # a stopping server resets it, or is gone
            socket.create_connection((host, self.port), PATIENCE, source).close()

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


def reset(peer: socket.socket) -> None:
    """Close with a reset, which leaves what was not read unread."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def until_end(peer: socket.socket) -> bytes:
    """What still arrives until the end of stream; fails on a reset."""
    data = bytearray()
    while part := peer.recv(65536):
        data += part
    return bytes(data)


def ended(peer: socket.socket) -> bytes:
    """What still arrives until the connection ends, by an end of stream or a reset."""
    data = b""
    try:
        while part := peer.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data
