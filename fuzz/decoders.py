"""Fuzz target: all that is decoded in Python, under atheris: `decoders.py [CORPUS...] [-runs=N]`.

Input: a byte that picks the decoder, then what it is given; where it takes several pieces, each begins with its length
in 2 bytes.  Property: the exceptions that the decoder's documentation names and no other, and nothing beyond its
bounds comes out.  Without atheris, `one_input` can be called on a corpus: tests/test_fuzz.py does.
"""

# ruff: noqa: S101  A property that does not hold is what a fuzzer looks for.

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

if __name__ == "__main__":  # the checkout's, and instrumented; else whose tests these are
    import atheris

    sys.path.insert(0, str(Path(__file__).parents[1]))
    with atheris.instrument_imports(
        include=["tt.connection", "tt.dispatch", "tt.noise", "tt.state_file", "tt.timeouts", "tt.wire"]
    ):
        from tt import connection, dispatch, noise, timeouts, wire
else:
    from tt import connection, dispatch, noise, timeouts, wire
from tt._core import REASON_CODES, TimeoutTable


class Key:
    """The server's, always the same."""

    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = private.public_key().public_bytes_raw()


class Connection:
    """What a session may do with its connection."""

    source = "192.0.2.1"

    def __init__(self) -> None:
        self.reason = ""

    def close(self, reason: str) -> None:
        assert reason in REASON_CODES
        self.reason = reason

    def log_in(self) -> None:
        pass


def transports() -> tuple[noise.Transport, noise.Transport]:
    """Two ends, as after a handshake."""
    a, b = AESGCM(bytes(32)), AESGCM(bytes(31) + b"\1")
    return noise.Transport(a, b), noise.Transport(b, a)


def pieces(data: bytes) -> Iterator[bytes]:
    while data:
        size = int.from_bytes(data[:2])
        yield data[2 : 2 + size]
        data = data[2 + size :]


# ---- the decoders ---------------------------------------------------------------------------------------------------


def assembler(data: bytes) -> None:
    """The first byte: whether flags are allowed; then plaintexts."""
    feeding = wire.Assembler(wire.MAX_TO_SERVER)
    feeding.flags_allowed = bool(data[:1] > b"\x7f")
    for plaintext in pieces(data[1:]):
        try:
            body = feeding.feed(plaintext)
        except wire.Tampered:
            continue
        assert body is None or len(body) <= wire.MAX_TO_SERVER


def requests(data: bytes) -> None:
    try:
        found = wire.decode_requests(data)
    except wire.Tampered:
        return
    assert 1 <= len(found) <= wire.MAX_ENTRIES
    assert all(isinstance(one, wire.Request | wire.Malformed) for one in found)


def replies(data: bytes) -> None:
    try:
        assert 1 <= len(wire.decode_replies(data)) <= wire.MAX_ENTRIES
    except wire.Tampered:
        return


def payloads(data: bytes) -> None:
    for decode in (wire.decode_hello, wire.decode_welcome):
        try:
            decode(data)
        except wire.Tampered:
            continue


def handshake(data: bytes) -> None:
    """Both messages of the handshake, and a frame after it: what is not authentic changes nothing."""
    hello, pending = noise.create_hello(Key.public, b"")
    _, waiting = noise.consume_hello(Key, hello)
    welcome, transport = noise.create_welcome(waiting, b"")
    for consume in (
        lambda: noise.consume_hello(Key, data), lambda: noise.consume_welcome(pending, data),
        lambda: transport.open(data[:8], data[8:]),
    ):  # fmt: skip
        try:
            consume()
        except noise.NoiseError:
            continue
        raise AssertionError("a forgery was taken")
    assert noise.consume_welcome(pending, welcome)[0] == b""


def server(data: bytes) -> None:
    """A session: the first byte logs in or not, then the plaintexts of authentic frames."""
    ours, theirs = transports()
    connection = Connection()
    offered = {"echo": lambda _session, arguments: arguments}
    session = dispatch.Session(dispatch.Dispatcher([Key], offered), connection, ours, wire.Hello("fuzz", "0"))
    if data[:1] > b"\x7f":
        session.log_in()
    frames = []
    for plaintext in pieces(data[1:]):
        head = wire.header(wire.DATA, len(plaintext) + wire.TAG)
        frames.append(head + theirs.seal(head, plaintext))
    session.receive(frames)
    assert connection.reason in ("", "tampered", "too_long")


def peer(data: bytes) -> None:
    """The client, given authentic frames by a server that means harm, and then what is no frame."""
    ours, theirs = transports()
    near, far = socket.socketpair()
    with near, far:
        far.setblocking(False)
        session = connection._Session(near, ours, "192.0.2.1:5000")
        if data[:1] > b"\x7f":
            session.log_in()
        try:
            for plaintext in pieces(data[1:]):
                head = wire.header(wire.DATA, len(plaintext) + wire.TAG)
                far.send(head + theirs.seal(head, plaintext))
            far.send(data)
        except BlockingIOError:
            return
        far.shutdown(socket.SHUT_WR)
        try:
            while True:
                body, size = session.receive(time.monotonic() + 60)
                assert len(body) <= wire.MAX_TO_CLIENT
                assert size <= len(data) * 40 + 64
        except (connection.ProtocolError, EOFError):
            return


def saved_table(data: bytes) -> None:
    """A file's bytes, and the dump that it would hold were its checksum right."""
    table = TimeoutTable(64, seed=bytes(16))
    for read in (lambda: timeouts.FILE._parse(data), lambda: table.load(data, 10**9)):
        try:
            read()
        except ValueError:
            continue
    assert len(table.entries(10**9, remembered=True)) <= 128


DECODERS: tuple[Callable[[bytes], None], ...] = (
    assembler, requests, replies, payloads, handshake, server, peer, saved_table,
)  # fmt: skip


def one_input(data: bytes) -> None:
    if data:
        DECODERS[data[0] % len(DECODERS)](data[1:])


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
