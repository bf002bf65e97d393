"""The one bridge from the loop to the operations: frames in, decrypted, decoded and answered; replies out, encrypted.

A `Dispatcher` makes a `Session` of each HELLO that authenticates; the loop gives the session whole frames and sends
what it returns.  Rules: what cannot come from an honest peer ends the connection as `tampered`; a request that is only
wrong gets an error reply, and the others their answers.  Requests of a connection take effect in the order sent.
Nothing here blocks: where a result is not there yet, the connection is parked and the loop serves others.
It must not know sockets, and of an operation only its name and how it is called.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from time import perf_counter
from types import GeneratorType
from typing import Any, Protocol

import msgspec

from tt import __version__, wire
from tt.noise import NoiseError, StaticKey, Transport, consume_hello, create_welcome
from tt.pending import Later, Pending

SERVER_NAME = "TapeTrackServer"
MAX_REQUESTS_BEFORE_LOGIN = 64  # in one message: login takes one
# What is done for one connection before others are served, whichever comes first.
SLICE = 128  # requests, or pings
SLICE_TIME = 0.001  # s
SLICE_SIZE = 256 * 1024  # bytes of results


# Gives None where others may be served, or what it waits for.
Work = Generator[Pending | None, None, None]
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


class _Kind:
    """An operation of a kind that the dispatcher treats in its own way."""

    __slots__ = ("_run",)

    def __init__(self, run: Operation) -> None:
        self._run = run

    def __call__(self, session: "Session", arguments: msgspec.Raw) -> object:
        return self._run(session, arguments)


class Read(_Kind):
    """An operation that is over when it returns: it gives neither a Later nor a generator."""

    __slots__ = ()


class Write(_Kind):
    """An operation that has made its change when it returns, and whose Later ends when the change is durable.

    Further ones may be made before that, so that all writes of a message share one commit.  Until `busy()` is None none
    may be made.
    """

    __slots__ = ("busy",)

    def __init__(self, run: Operation, busy: Callable[[], Pending | None]) -> None:
        super().__init__(run)
        self.busy = busy


class Secret(_Kind):
    """An operation of which request or reply holds a password: its replies are not compressed, since the length of a
    frame tells about what is compressed in it."""

    __slots__ = ()


# What a request is answered with an error for; all else is a failure of our own.
ANSWERED = (OperationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Dispatcher:
    """Takes HELLOs for the keys in force (two during a change, the new one first) and offers the operations."""

    def __init__(
        self,
        keys: Sequence[StaticKey],
        operations: Mapping[str, Operation],
        ended: Callable[["Session"], None] = lambda _: None,
    ) -> None:
        self.keys = keys
        self.operations = operations
        self.ended = ended  # called with each session that had an account, at its end
        self.old_key_handshakes = 0
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
            self.old_key_handshakes += key is not self.keys[0]
            return Session(self, connection, transport, hello), wire.header(wire.WELCOME, len(welcome)) + welcome
        return None


class Session:
    """One connection from its WELCOME on."""

    __slots__ = (
        "_assembler", "_connection", "_dispatcher", "_slice_ends", "_transport",
        "account", "closing", "hello", "requests",
    )  # fmt: skip

    def __init__(self, dispatcher: Dispatcher, connection: Connection, transport: Transport, hello: wire.Hello) -> None:
        self._dispatcher = dispatcher
        self._connection = connection
        self._transport = transport
        self._assembler = wire.Assembler(wire.MAX_TO_SERVER)
        self._slice_ends = 0.0
        self.closing = False  # nothing more is done for it
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
        self.closing = True
        self._connection.close(reason)

    def receive(self, frames: list[bytes]) -> bytes | Iterator[bytes | None] | None:
        """Answer whole DATA frames, in their order: the frames to send back.

        Work of more than a slice, or that waits, comes as an iterator, so that the loop serves others between its
        parts; None in it parks the connection until Connection.resume().
        """
        answers: list[bytes] = []
        self._slice_ends = perf_counter() + SLICE_TIME
        work = self._work(frames, answers)
        try:
            pending = next(work)
        except StopIteration:
            return b"".join(answers) or None
        return _parts(work, pending, answers, self._connection)

    def closed(self, reason: str) -> None:
        """The loop's word that the connection has ended."""
        self.closing = True
        if self.account is not None:
            self._dispatcher.ended(self)

    def _sealed(self, body: bytes, *, compress: bool) -> list[bytes]:
        return [
            (head := wire.header(wire.DATA, len(plaintext) + wire.TAG)) + self._transport.seal(head, plaintext)
            for plaintext in wire.split_message(body, wire.MAX_DATA, compress=compress)
        ]

    def _work(self, frames: list[bytes], answers: list[bytes]) -> Work:
        """Appends the answers."""
        left = SLICE
        try:
            for frame in frames:
                if self.closing:
                    return
                # Each slice does something: the process may have been held up between its beginning and here.
                if left < SLICE and (left <= 0 or perf_counter() > self._slice_ends):
                    yield from self._pause(None)
                    left = SLICE
                body = self._assembler.feed(self._transport.open(frame[: wire.HEADER], frame[wire.HEADER :]))
                if body:
                    requests = wire.decode_requests(body)
                    left -= len(requests)
                    if len(requests) > 1 or not self._answer_read(requests[0], answers):
                        yield from self._answer(requests, answers)
                elif body is not None:
                    left -= 1
                    answers.append(_PING_HEADER + self._transport.seal(_PING_HEADER, _PING))
        except (NoiseError, wire.Tampered):
            self.close("tampered")

    def _pause(self, pending: Pending | None) -> Work:
        yield pending
        self._slice_ends = perf_counter() + SLICE_TIME

    def _wait(self, pending: Pending) -> Work:
        while not pending.done:
            yield from self._pause(pending)

    def _answer_read(self, request: wire.Request | wire.Malformed, answers: list[bytes]) -> bool:
        """Answers a message of one Read, as most are, without the machinery for what may have to wait.  Else False."""
        operation = self._dispatcher.operations.get(request.operation) if type(request) is wire.Request else None
        if type(operation) is not Read:
            return False
        compress = self.logged_in
        self.requests += 1
        for body in _bodies([_begin(self, request, operation)]):
            answers += self._sealed(body, compress=compress)
        return True

    def _answer(self, requests: list[wire.Request | wire.Malformed], answers: list[bytes]) -> Work:
        compress = self.logged_in  # the reply to login itself still has no flags
        most = len(requests) if compress else MAX_REQUESTS_BEFORE_LOGIN
        self.requests += len(requests)
        at = 0
        while at < min(len(requests), most) and not self.closing:
            if at:
                yield from self._pause(None)
            replies: list[wire.Reply] = []
            compress &= yield from self._replies(islice(requests, at, min(at + SLICE, most)), replies)
            at += len(replies)
            for body in _bodies(replies):
                answers += self._sealed(body, compress=compress)
        if len(requests) > most:
            self.close("too_long")

    def _replies(
        self, requests: Iterable[wire.Request | wire.Malformed], replies: list[wire.Reply]
    ) -> Generator[Pending | None, None, bool]:
        """Appends a slice of replies, in the order of their requests, when all are there; whether none has a secret."""
        open_ = True
        size = 0
        unfinished: list[tuple[int, Later]] = []  # writes whose place in `replies` waits for their commit
        for request in requests:
            operation = self._dispatcher.operations.get(request.operation) if type(request) is wire.Request else None
            writes = type(operation) is Write
            open_ &= type(operation) is not Secret
            if unfinished and not writes:
                yield from self._finish(unfinished, replies)
            while writes and (pending := operation.busy()) is not None:  # type: ignore[union-attr]
                yield from self._wait(pending)
            if self.closing:
                break
            result = _begin(self, request, operation)
            if type(result) is GeneratorType:
                result = yield from self._run(result, request.id)
            if type(result) is Later:
                unfinished.append((len(replies), result))
                result = wire.Reply(request.id)
            replies.append(result)
            if unfinished and not writes:
                yield from self._finish(unfinished, replies)
            size += len(replies[-1].result)
            if size > SLICE_SIZE or perf_counter() > self._slice_ends:
                break
        yield from self._finish(unfinished, replies)
        return open_

    def _run(
        self, steps: Generator[Pending | None, None, object], number: int | None
    ) -> Generator[Pending | None, None, Any]:
        """The reply, or the Later, of an operation that works step by step."""
        while True:
            try:
                pending = next(steps)
            except StopIteration as end:
                return end.value if type(end.value) is Later else _success(number, end.value)
            except ANSWERED as error:
                return _failure(number, error)
            yield from self._pause(None) if pending is None else self._wait(pending)

    def _finish(self, unfinished: list[tuple[int, Later]], replies: list[wire.Reply]) -> Work:
        """Puts the results that were waited for where they belong."""
        for place, later in unfinished:
            yield from self._wait(later.pending)
            number = replies[place].id
            try:
                replies[place] = _success(number, later.result())
            except ANSWERED as error:
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
    except ANSWERED as error:
        return _failure(request.id, error)
    if type(result) is Later or type(result) is GeneratorType:
        return result
    return _success(request.id, result)


def _success(number: int | None, result: object) -> wire.Reply:
    return wire.Reply(number, None, result if type(result) is msgspec.Raw else msgspec.Raw(_encode(result)))


def _failure(number: int | None, error: Exception) -> wire.Reply:
    return wire.Reply(number, wire.ReplyError(*told(error)))


def told(error: Exception) -> tuple[str, str]:
    """The code and the message with which one of ANSWERED is answered."""
    if isinstance(error, OperationError):
        return error.code, str(error)
    # The text of a UnicodeDecodeError quotes the peer's bytes.
    return "malformed", "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _parts(work: Work, pending: Pending | None, answers: list[bytes], connection: Connection) -> Iterator[bytes | None]:
    """The answers of one slice after the other, None where the work waits."""
    while True:
        part = b"".join(answers)
        answers.clear()
        if part or pending is None:
            yield part
        # Looked at once more: it may have ended while that part went out, and then nobody would go on.
        if pending is not None and not pending.done:
            pending.when_done(connection.resume)
            yield None
        try:
            pending = next(work)
        except StopIteration:
            yield b"".join(answers)
            return


def _bodies(replies: list[wire.Reply]) -> Iterable[bytes]:
    """The replies in one body where they fit; clients pack requests, so that they may not."""
    if not replies:
        return []
    try:
        return [wire.encode_replies(replies)]
    except ValueError:
        if len(replies) > 1:
            half = len(replies) // 2
            return chain(_bodies(replies[:half]), _bodies(replies[half:]))
        error = wire.ReplyError("too_long", f"the result is longer than {wire.MAX_TO_CLIENT} bytes: ask for less")
        return [wire.encode_replies([wire.Reply(replies[0].id, error)])]
