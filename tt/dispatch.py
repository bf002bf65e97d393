"""The one bridge from the loop to the operations: frames in, decrypted, decoded and answered; replies out, encrypted.

A `Dispatcher` makes a `Session` of each HELLO that authenticates; the loop gives the session whole frames and sends
what it returns.  Rules: what cannot come from an honest peer ends the connection as `tampered`; a request that is only
wrong gets an error reply, and the others their answers.  Nothing here blocks.
It must not know sockets, and of an operation only its name and that it can be called.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from tt import __version__, wire
from tt.noise import NoiseError, StaticKey, Transport, consume_hello, create_welcome

SERVER_NAME = "TapeTrackServer"
MAX_REQUESTS_BEFORE_LOGIN = 64  # in one message: login takes one
SLICE = 256  # requests that are answered before the loop serves others

_PING = b"\0"  # the flags byte alone
_PING_HEADER = wire.header(wire.DATA, len(_PING) + wire.TAG)
_DONE = object()
_encode = msgspec.msgpack.Encoder().encode


class Connection(Protocol):
    """What a session knows of its connection: tt._core.Connection."""

    @property
    def source(self) -> str: ...

    def close(self, reason: str, /) -> None: ...

    def log_in(self) -> None: ...


class OperationError(Exception):
    """Answers one request with an error: a word for programs, a sentence for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Operation = Callable[["Session", msgspec.Raw], object]  # session, arguments (a MessagePack map) -> what the reply holds


class Dispatcher:
    """Takes HELLOs for the keys in force (two during a change) and offers the operations."""

    def __init__(self, keys: Sequence[StaticKey], operations: Mapping[str, Operation]) -> None:
        self.keys = keys
        self.operations = operations
        self._welcome = wire.encode_welcome(wire.Welcome(SERVER_NAME, __version__))

    def hello(self, connection: Connection, frame: bytes) -> "tuple[Session, bytes] | None":
        """The session and the WELCOME frame for a HELLO frame, or None where it does not authenticate."""
        message = frame[wire.HEADER :]
        for key in self.keys:
            try:
                payload, pending = consume_hello(key, message)
                hello = wire.decode_hello(payload)
                welcome, transport = create_welcome(pending, self._welcome)
            except (NoiseError, wire.Tampered):
                continue
            return Session(self, connection, transport, hello), wire.header(wire.WELCOME, len(welcome)) + welcome
        return None


class Session:
    """One connection from its WELCOME on."""

    __slots__ = ("_assembler", "_closing", "_connection", "_dispatcher", "_transport", "hello")

    def __init__(self, dispatcher: Dispatcher, connection: Connection, transport: Transport, hello: wire.Hello) -> None:
        self._dispatcher = dispatcher
        self._connection = connection
        self._transport = transport
        self._assembler = wire.Assembler(wire.MAX_TO_SERVER)
        self._closing = False
        self.hello = hello

    @property
    def source(self) -> str:
        """Whom a time-out would hit: an IPv4 address or an IPv6 prefix."""
        return self._connection.source

    @property
    def logged_in(self) -> bool:
        return self._assembler.flags_allowed

    def log_in(self) -> None:
        """From here on: compression, messages of several frames, longer frames, and the loop's patience for users."""
        self._assembler.flags_allowed = True
        self._connection.log_in()

    def close(self, reason: str) -> None:
        """End the connection; `reason` is one of tt._core.REASONS.

        What was answered before is still sent, unless the reason times out; nothing that follows is done any more.
        """
        self._closing = True
        self._connection.close(reason)

    def receive(self, frames: list[bytes]) -> bytes | Iterator[bytes] | None:
        """Answer whole DATA frames, in their order: the frames to send back.

        Work of more than a slice comes as an iterator, so that the loop serves others between its parts.
        """
        answers: list[bytes] = []
        work = self._work(frames, answers)
        if next(work, _DONE) is _DONE:
            return b"".join(answers) or None
        return _parts(work, answers)

    def closed(self, reason: str) -> None:
        """The loop's word that the connection has ended."""

    def _sealed(self, body: bytes, *, compress: bool) -> Iterable[bytes]:
        for plaintext in wire.split_message(body, wire.MAX_DATA, compress=compress):
            head = wire.header(wire.DATA, len(plaintext) + wire.TAG)
            yield head + self._transport.seal(head, plaintext)

    def _work(self, frames: list[bytes], answers: list[bytes]) -> Iterator[None]:
        """Appends the answers; stops where a slice of work is done and more is to do."""
        left = SLICE
        try:
            for frame in frames:
                if self._closing:
                    return
                if left <= 0:
                    yield
                    left = SLICE
                body = self._assembler.feed(self._transport.open(frame[: wire.HEADER], frame[wire.HEADER :]))
                if body:
                    requests = wire.decode_requests(body)
                    left -= len(requests)
                    yield from self._answer(requests, answers)
                elif body is not None:
                    answers.append(_PING_HEADER + self._transport.seal(_PING_HEADER, _PING))
        except (NoiseError, wire.Tampered):
            self.close("tampered")

    def _answer(self, requests: list[wire.Request | wire.Malformed], answers: list[bytes]) -> Iterator[None]:
        compress = self.logged_in  # the reply to login itself still has no flags
        most = len(requests) if compress else MAX_REQUESTS_BEFORE_LOGIN
        for start in range(0, min(len(requests), most), SLICE):
            if start:
                yield
            replies: list[wire.Reply] = []
            for request in requests[start : min(start + SLICE, most)]:
                if self._closing:
                    break
                replies.append(self._reply(request))
            for body in _bodies(replies):
                answers += self._sealed(body, compress=compress)
        if len(requests) > most:
            self.close("too_long")

    def _reply(self, request: wire.Request | wire.Malformed) -> wire.Reply:
        if isinstance(request, wire.Malformed):
            return wire.Reply(request.id, wire.ReplyError("malformed", request.reason))
        operation = self._dispatcher.operations.get(request.operation)
        if operation is None:
            return wire.Reply(request.id, wire.ReplyError("unknown_operation", "this server has no such operation"))
        try:
            return wire.Reply(request.id, None, msgspec.Raw(_encode(operation(self, request.arguments))))
        except OperationError as error:
            return wire.Reply(request.id, wire.ReplyError(error.code, str(error)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # The text of the second quotes the peer's bytes.
            reason = "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            return wire.Reply(request.id, wire.ReplyError("malformed", reason))


def _parts(work: Iterator[None], answers: list[bytes]) -> Iterator[bytes]:
    """The answers of one slice after the other."""
    done = None
    while done is not _DONE:
        part = b"".join(answers)
        answers.clear()
        yield part
        done = next(work, _DONE)
    yield b"".join(answers)


def _bodies(replies: list[wire.Reply]) -> Iterator[bytes]:
    """The replies in one body where they fit; clients pack requests, so that they may not."""
    if not replies:
        return
    try:
        body = wire.encode_replies(replies)
    except ValueError:
        if len(replies) > 1:
            half = len(replies) // 2
            yield from _bodies(replies[:half])
            yield from _bodies(replies[half:])
            return
        error = wire.ReplyError("too_long", f"the result is longer than {wire.MAX_TO_CLIENT} bytes: ask for less")
        body = wire.encode_replies([wire.Reply(replies[0].id, error)])
    yield body
