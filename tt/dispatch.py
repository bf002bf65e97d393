"""The one bridge from the loop to the operations: frames in, decrypted, decoded and answered; replies out, encrypted.

A `Dispatcher` makes a `Session` of each HELLO that authenticates; the loop gives the session whole frames and sends
what it returns.  Rules: what cannot come from an honest peer ends the connection as `tampered`; a request that is only
wrong gets an error reply, and the others their answers.  Requests of a connection take effect in the order sent.
Nothing here blocks: where a result is not there yet, the connection is parked and the loop serves others.
It must not know sockets, and of an operation only its name and how it is called.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, Protocol

import msgspec

from tt import __version__, wire
from tt.noise import NoiseError, StaticKey, Transport, consume_hello, create_welcome
from tt.pending import Later, Pending

SERVER_NAME = "TapeTrackServer"
MAX_REQUESTS_BEFORE_LOGIN = 64  # in one message: login takes one
SLICE = 128  # requests that are answered before the loop serves others: about 2 ms where each is a change


Work = Generator[bool, None, None]  # gives GO_ON between slices, PARK where it waits for Connection.resume()
GO_ON, PARK = True, False
_PING = b"\0"  # the flags byte alone
_PING_HEADER = wire.header(wire.DATA, len(_PING) + wire.TAG)
_encode = msgspec.msgpack.Encoder().encode


class Connection(Protocol):
    """What a session knows of its connection: tt._core.Connection."""

    @property
    def source(self) -> str: ...

    @property
    def address(self) -> str: ...

    def close(self, reason: str, /) -> None: ...

    def resume(self) -> None: ...

    def log_in(self) -> None: ...


class OperationError(Exception):
    """Answers one request with an error: a word for programs, a sentence for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# session, arguments (a MessagePack map) -> what the reply holds; or a Later; or a generator, which gives None where
# others may be served, or a Pending to wait for, and returns what the reply holds or a Later.
Operation = Callable[["Session", msgspec.Raw], object]


class Write:
    """An operation that has made its change when it returns, and whose Later ends when the change is durable.

    Further ones may be made before that, so that all writes of a message share one commit.  Until `busy()` is None none
    may be made.
    """

    __slots__ = ("_run", "busy")

    def __init__(self, run: Operation, busy: Callable[[], Pending | None]) -> None:
        self._run = run
        self.busy = busy

    def __call__(self, session: "Session", arguments: msgspec.Raw) -> object:
        return self._run(session, arguments)


class Secret:
    """An operation of which request or reply holds a password: its replies are not compressed, since the length of a
    frame tells about what is compressed in it."""

    __slots__ = ("_run",)

    def __init__(self, run: Operation) -> None:
        self._run = run

    def __call__(self, session: "Session", arguments: msgspec.Raw) -> object:
        return self._run(session, arguments)


# What a request is answered with an error for; all else is a failure of our own.
_ANSWERED = (OperationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Dispatcher:
    """Takes HELLOs for the keys in force (two during a change) and offers the operations."""

    def __init__(
        self,
        keys: Sequence[StaticKey],
        operations: Mapping[str, Operation],
        ended: Callable[["Session"], None] = lambda _: None,
    ) -> None:
        self.keys = keys
        self.operations = operations
        self.ended = ended  # called with each session that had an account, at its end
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

    __slots__ = ("_assembler", "_closing", "_connection", "_dispatcher", "_transport", "account", "hello", "requests")

    def __init__(self, dispatcher: Dispatcher, connection: Connection, transport: Transport, hello: wire.Hello) -> None:
        self._dispatcher = dispatcher
        self._connection = connection
        self._transport = transport
        self._assembler = wire.Assembler(wire.MAX_TO_SERVER)
        self._closing = False
        self.hello = hello
        self.account: Any = None  # the application's word for who has logged in
        self.requests = 0

    @property
    def source(self) -> str:
        """Whom a time-out would hit: an IPv4 address or an IPv6 prefix."""
        return self._connection.source

    @property
    def address(self) -> str:
        """The peer's own address."""
        return self._connection.address

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

    def receive(self, frames: list[bytes]) -> bytes | Iterator[bytes | None] | None:
        """Answer whole DATA frames, in their order: the frames to send back.

        Work of more than a slice, or that waits, comes as an iterator, so that the loop serves others between its
        parts; None in it parks the connection until Connection.resume().
        """
        answers: list[bytes] = []
        work = self._work(frames, answers)
        mark = next(work, None)
        if mark is None:
            return b"".join(answers) or None
        return _parts(work, mark, answers)

    def closed(self, reason: str) -> None:
        """The loop's word that the connection has ended."""
        self._closing = True
        if self.account is not None:
            self._dispatcher.ended(self)

    def _sealed(self, body: bytes, *, compress: bool) -> Iterable[bytes]:
        for plaintext in wire.split_message(body, wire.MAX_DATA, compress=compress):
            head = wire.header(wire.DATA, len(plaintext) + wire.TAG)
            yield head + self._transport.seal(head, plaintext)

    def _work(self, frames: list[bytes], answers: list[bytes]) -> Work:
        """Appends the answers."""
        left = SLICE
        try:
            for frame in frames:
                if self._closing:
                    return
                if left <= 0:
                    yield GO_ON
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

    def _answer(self, requests: list[wire.Request | wire.Malformed], answers: list[bytes]) -> Work:
        compress = self.logged_in  # the reply to login itself still has no flags
        most = len(requests) if compress else MAX_REQUESTS_BEFORE_LOGIN
        self.requests += len(requests)
        for start in range(0, min(len(requests), most), SLICE):
            if start:
                yield GO_ON
            replies: list[wire.Reply] = []
            compress &= yield from self._replies(requests[start : min(start + SLICE, most)], replies)
            for body in _bodies(replies):
                answers += self._sealed(body, compress=compress)
        if len(requests) > most:
            self.close("too_long")

    def _replies(
        self, requests: list[wire.Request | wire.Malformed], replies: list[wire.Reply]
    ) -> Generator[bool, None, bool]:
        """Appends a reply for each request, in their order, once all of them are there; whether none holds a secret."""
        open_ = True
        unfinished: list[tuple[int, Later]] = []  # writes whose place in `replies` waits for their commit
        for request in requests:
            operation = self._dispatcher.operations.get(request.operation) if type(request) is wire.Request else None
            writes = type(operation) is Write
            open_ &= type(operation) is not Secret
            if unfinished and not writes:
                yield from _wait_for(unfinished, replies, self._connection)
            while writes and (pending := operation.busy()) is not None:  # type: ignore[union-attr]
                yield from _wait(pending, self._connection)
            if self._closing:
                break
            result = _begin(self, request, operation)
            if type(result) is GeneratorType:
                result = yield from self._run(result, request.id)
            if type(result) is Later:
                unfinished.append((len(replies), result))
                result = wire.Reply(request.id)
                if not writes:
                    replies.append(result)
                    yield from _wait_for(unfinished, replies, self._connection)
                    continue
            replies.append(result)
        if unfinished:
            yield from _wait_for(unfinished, replies, self._connection)
        return open_

    def _run(self, steps: Generator[Pending | None, None, object], number: int | None) -> Generator[bool, None, Any]:
        """The reply, or the Later, of an operation that works step by step."""
        while True:
            try:
                pending = next(steps)
            except StopIteration as end:
                return end.value if type(end.value) is Later else _success(number, end.value)
            except _ANSWERED as error:
                return _failure(number, error)
            if pending is None:
                yield GO_ON
            else:
                yield from _wait(pending, self._connection)


def _wait(pending: Pending, connection: Connection) -> Work:
    while not pending.done:
        pending.when_done(connection.resume)
        yield PARK


def _wait_for(unfinished: list[tuple[int, Later]], replies: list[wire.Reply], connection: Connection) -> Work:
    """Puts the results that have come where they belong."""
    for place, later in unfinished:
        yield from _wait(later.pending, connection)
        number = replies[place].id
        try:
            replies[place] = _success(number, later.result())
        except _ANSWERED as error:
            replies[place] = _failure(number, error)
    unfinished.clear()


def _begin(session: Session, request: wire.Request | wire.Malformed, operation: Operation | None) -> Any:
    """A Reply, a Later or a generator."""
    if isinstance(request, wire.Malformed):
        return wire.Reply(request.id, wire.ReplyError("malformed", request.reason))
    if operation is None:
        return wire.Reply(request.id, wire.ReplyError("unknown_operation", "this server has no such operation"))
    try:
        result = operation(session, request.arguments)
    except _ANSWERED as error:
        return _failure(request.id, error)
    if type(result) is Later or type(result) is GeneratorType:
        return result
    return _success(request.id, result)


def _success(number: int | None, result: object) -> wire.Reply:
    return wire.Reply(number, None, msgspec.Raw(_encode(result)))


def _failure(number: int | None, error: Exception) -> wire.Reply:
    if isinstance(error, OperationError):
        return wire.Reply(number, wire.ReplyError(error.code, str(error)))
    # The text of a UnicodeDecodeError quotes the peer's bytes.
    reason = "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    return wire.Reply(number, wire.ReplyError("malformed", reason))


def _parts(work: Work, mark: bool | None, answers: list[bytes]) -> Iterator[bytes | None]:
    """The answers of one slice after the other, None where the work waits."""
    while mark is not None:
        part = b"".join(answers)
        answers.clear()
        if part or mark is GO_ON:
            yield part
        if mark is PARK:
            yield None
        mark = next(work, None)
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
