"""One connection to a server: the handshake, frames, requests and their replies, and what can go wrong with them.

Rules: the server's public key is known beforehand (`key`, or the known servers); there is no trust on first use.  What
the server sends is bounded before it is stored: a frame to 65,535 bytes, a message to 16 MiB.  Any failure of an
operation but RequestFailed closes the connection, since what comes later could be taken for the answer of the next
operation; connect() opens it again.  Each error is one sentence: what happened, to which HOST:PORT, what to do.
Not thread-safe.  Must not know any operation but login, the server, its configuration or the command line.
"""

# ruff: noqa: N818  The errors are named for what happened; "Error" behind each would say nothing more.

import enum
import ipaddress
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from tt import __version__, known_servers, noise, wire

MAX_VERSIONS = 255  # bytes of a REFUSE, one a version
REQUEST_HEAD = 13  # bytes at most that MessagePack adds to a request's operation and arguments
LOGIN = "login"  # the operation after whose success the limits of a session widen
WHERE_TO_LOOK = "see the server's log, or run 'tt bans list' on the server"


class TapeTrackError(Exception):
    """Any failure of the client; the text is one sentence for people."""


class UnknownServer(TapeTrackError):
    """No key of the server is known, so nothing was sent to it."""


class NoConnection(TapeTrackError):
    """No address of the server could be connected to, or each dropped us before its WELCOME."""


class NotAccepted(TapeTrackError):
    """The peer answered, but not with a WELCOME that proves that it holds the server's key."""


class Refused(TapeTrackError):
    """The server does not speak our version of the protocol; `versions` are what it names (nothing proves them)."""

    def __init__(self, text: str, versions: tuple[int, ...]) -> None:
        super().__init__(text)
        self.versions = versions


class ConnectionLost(TapeTrackError):
    """The connection ended, or the answer did not come in time; whether a request took effect is not known."""


class ProtocolError(TapeTrackError):
    """The server sent, inside the encrypted connection, what the protocol does not allow."""


class RequestFailed(TapeTrackError):
    """The server answered a request with an error: `code` for programs, `message` for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message


class Pong(NamedTuple):
    """The answer to a ping: its size on the wire in bytes, header included, and the round trip's time in seconds."""

    size: int
    seconds: float


class Call(NamedTuple):
    """A request: what is asked for, and how the result is decoded."""

    operation: str
    arguments: msgspec.Raw
    decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder()
    secret: bool = False  # it holds a password


class Message(NamedTuple):
    """Calls made ready to be sent together, each with the id of its request."""

    calls: dict[int, Call]
    body: bytes

    @property
    def compress(self) -> bool:
        # The length of what is compressed would tell about a secret in it.
        return not any(call.secret for call in self.calls.values())


class _Stage(enum.Enum):
    UNREACHABLE = enum.auto()  # another key does not help
    DROPPED = enum.auto()  # connected, but closed before WELCOME
    NOT_AUTHENTIC = enum.auto()  # a WELCOME that our key does not open


class _AttemptFailed(Exception):
    """One address with one key; connect() goes on with the next."""

    def __init__(self, stage: _Stage, cause: str) -> None:
        super().__init__(cause)
        self.stage = stage


class _Address(NamedTuple):
    family: int
    socket_address: Any  # as getaddrinfo gives it for the family

    @property
    def text(self) -> str:
        return str(self.socket_address[0])


class _Session:
    """A connection after its handshake: messages in, messages out; which requests still wait for their replies."""

    def __init__(self, sock: socket.socket, transport: noise.Transport, peer: str) -> None:
        self._sock = sock
        self._transport = transport
        self._peer = peer
        self._assembler = wire.Assembler(wire.MAX_TO_CLIENT)
        self._asked: dict[int, Call | None] = {}  # by id; None: nobody wants the reply any more
        self._arrived: dict[int, wire.Reply] = {}  # replies that wait to be taken
        self.logged_in = False

    @property
    def largest_message(self) -> int:
        """Bytes of the largest body that may be sent now."""
        return wire.MAX_TO_SERVER if self.logged_in else wire.MAX_BEFORE_LOGIN - wire.TAG - 1

    def log_in(self) -> None:
        self.logged_in = True
        self._assembler.flags_allowed = True

    def ask(self, message: Message, deadline: float) -> None:
        """Send requests."""
        self._asked |= message.calls
        self.send(message.body, deadline, compress=message.compress)

    def take(self, number: int, call: Call, deadline: float) -> "Any | RequestFailed":
        """The result of a request that was asked, or its error; replies to others are kept until they are taken.

        Raises OSError, EOFError and ProtocolError.
        """
        while number not in self._arrived:
            self._read_replies(self.receive(deadline)[0])
        reply = self._arrived.pop(number)
        if reply.error is not None:
            return RequestFailed(reply.error.code, reply.error.message)
        return self.decode(call.decoder, reply.result)

    def forget(self, number: int) -> None:
        """Take a request's reply for nobody, whenever it comes."""
        if self._arrived.pop(number, None) is None:
            self._asked[number] = None

    def ping(self, deadline: float) -> int:
        """Send a ping and return the size of its answer on the wire in bytes.  Raises as `take`."""
        self.send(b"", deadline)
        while True:
            body, size = self.receive(deadline)
            if not body:
                return size
            if not self._asked:
                raise self.broken("a message in place of the answer to a ping")
            self._read_replies(body)

    def decode(self, decoder: msgspec.msgpack.Decoder[Any], result: msgspec.Raw) -> Any:
        """Decode a result.  Raises ProtocolError."""
        try:
            return decoder.decode(result)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: no UTF-8
            raise self.broken("a reply that cannot be read") from error

    def _read_replies(self, body: bytes) -> None:
        try:
            replies = wire.decode_replies(body)
        except wire.Tampered as error:
            raise self.broken("a reply that cannot be read") from error
        for reply in replies:
            if reply.id is None or reply.id not in self._asked:
                raise self.broken("a reply to another request")
            call = self._asked.pop(reply.id)
            if call is not None:
                self._arrived[reply.id] = reply
                if call.operation == LOGIN and reply.error is None:
                    self.log_in()

    def send(self, body: bytes, deadline: float, *, compress: bool = True) -> None:
        """Send a body of at most `largest_message` bytes; b"" is the ping."""
        max_frame = wire.MAX_DATA if self.logged_in else wire.MAX_BEFORE_LOGIN
        for plaintext in wire.split_message(body, max_frame, compress=compress and self.logged_in):
            header = wire.header(wire.DATA, len(plaintext) + wire.TAG)
            _send(self._sock, header + self._transport.seal(header, plaintext), deadline)

    def receive(self, deadline: float) -> tuple[bytes, int]:
        """Return the next body and its size on the wire in bytes.  Raises OSError, EOFError and ProtocolError."""
        size = 0
        while True:
            header = _receive(self._sock, wire.HEADER, deadline)
            try:
                kind, length = wire.parse_header(header)  # bounds the length, before a byte is stored
                if kind != wire.DATA or length < 1 + wire.TAG:
                    raise self.broken(f"a frame of type {kind} and length {length}")
                ciphertext = _receive(self._sock, length, deadline)
                body = self._assembler.feed(self._transport.open(header, ciphertext))
            except (wire.BadFrame, noise.NoiseError, wire.Tampered) as error:
                raise self.broken(str(error)) from error
            size += len(header) + length
            if body is not None:
                return body, size

    def broken(self, cause: str) -> ProtocolError:
        return ProtocolError(
            f"{self._peer} broke the protocol ({cause}): connect again; if it goes on, tell the server's operator"
        )

    def close(self) -> None:
        self._sock.close()


class Asked(NamedTuple):
    """A request that was sent."""

    session: _Session
    call: tuple[int, Call]


class Connection:
    """A connection to one tape-tracking server; a context manager that connects and closes.

    key      the server's public key, 32 bytes; without it the known servers' file must have HOST:PORT
    source   the local IP address to connect from
    timeout  seconds that connect() or any other operation may take; finding the host's addresses is not counted
    name     what the server's log calls this client

    Raises ValueError for a bad argument.
    """

    def __init__(  # noqa: PLR0913
        self,
        host: str,
        port: int = known_servers.DEFAULT_PORT,
        *,
        key: bytes | None = None,
        source: str | None = None,
        timeout: float = 10.0,
        name: str = "tt",
    ) -> None:
        self._peer = known_servers.format_address(host, port)
        self._host, self._port = host, port
        self._key = key
        self._source = None if source is None else ipaddress.ip_address(source)
        self._timeout = timeout
        self._hello = wire.encode_hello(wire.Hello(name=name, version=__version__))
        self._session: _Session | None = None
        self._last_id = 0
        self.address = ""  # the server's IP address, of the present or last connection

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as the last operation could tell."""
        return self._session is not None

    def close(self) -> None:
        """Close the connection; nothing happens where there is none."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def connect(self) -> None:
        """Connect anew and prove that the server holds its key; every address and every known key is tried.

        Raises UnknownServer, NoConnection, NotAccepted, Refused, and KnownServersError.
        """
        self.close()
        keys = [self._key] if self._key is not None else known_servers.lookup(self._host, self._port)
        if not keys:
            raise UnknownServer(
                f"{self._peer} is not a known server: get its key from its operator (the file server.pub in its data "
                f"directory), then run 'tt known add {self._peer} KEY'"
            )
        addresses = self._resolve()
        failures: dict[_Address, _AttemptFailed] = {}
        deadline = time.monotonic() + self._timeout
        for key in keys:
            for number, address in enumerate(addresses):
                # An address that swallows packets must leave time for those after it.
                share = max(0.0, deadline - time.monotonic()) / (len(addresses) - number)
                try:
                    self._session = self._attempt(address, key, share)
                except _AttemptFailed as error:
                    failures[address] = error
                else:
                    self.address = address.text
                    return
            addresses = [address for address in addresses if failures[address].stage is not _Stage.UNREACHABLE]
        raise self._failure(failures)

    def ping(self) -> Pong:
        """Send an empty message and wait for the empty answer; no login is needed.

        Raises ConnectionLost, ProtocolError.
        """
        with self._operation() as (session, deadline):
            start = time.perf_counter()
            size = session.ping(deadline)
            seconds = time.perf_counter() - start
        return Pong(size, seconds)

    def request(self, operation: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Ask for one operation by name and return its result, decoded from MessagePack.

        Raises RequestFailed (the connection stays), ConnectionLost, ProtocolError; TypeError for arguments that
        MessagePack cannot hold.
        """
        (result,) = self.exchange([Call(operation, msgspec.Raw(msgspec.msgpack.encode(arguments or {})))])
        if isinstance(result, RequestFailed):
            raise result
        return result

    def exchange(self, calls: Sequence[Call], results: "list[Any | RequestFailed] | None" = None) -> list[Any]:
        """Ask for several operations in as few messages as hold them; each one's result or error, in their order.

        A message is sent when the one before is answered; each has the whole time-out.  Raises ConnectionLost and
        ProtocolError: then a list given as `results` has what was answered, and the rest may have been done or not.
        """
        results = [] if results is None else results
        for some in self._together(calls):
            try:
                message = self._message(some)
            except RequestFailed as error:  # one alone: what is asked together fits
                results.append(error)
                continue
            with self._operation() as (session, deadline):
                session.ask(message, deadline)
                for number, call in message.calls.items():
                    results.append(session.take(number, call, deadline))  # kept where the next one fails
        return results

    def begin(self, call: Call) -> "Asked":
        """Send a request whose result `finish` waits for, or which `forget` gives up.  Raises as `exchange`."""
        message = self._message([call])
        with self._operation() as (session, deadline):
            session.ask(message, deadline)
        return Asked(session, *message.calls.items())

    def finish(self, asked: "Asked") -> Any:
        """The result of what was begun.  Raises RequestFailed, ConnectionLost and ProtocolError."""
        if asked.session is not self._session:
            raise ConnectionLost(f"the connection to {self._peer} on which this was asked is closed: ask again")
        with self._operation() as (session, deadline):
            result = session.take(*asked.call, deadline)
        if isinstance(result, RequestFailed):
            raise result
        return result

    def forget(self, asked: "Asked") -> None:
        """Want the result of what was begun no more."""
        asked.session.forget(asked.call[0])

    def decode(self, decoders: Sequence[msgspec.msgpack.Decoder[Any]], results: Sequence[msgspec.Raw]) -> list[Any]:
        """Decode results that came inside another one.  Raises ProtocolError."""
        with self._operation() as (session, _):
            if len(decoders) != len(results):
                raise session.broken(f"{len(results)} results for {len(decoders)} operations")
            return [session.decode(decoder, result) for decoder, result in zip(decoders, results, strict=True)]

    def _together(self, calls: Sequence[Call]) -> Iterator[list[Call]]:
        """The calls in groups that one message holds."""
        start = size = 0
        for number, call in enumerate(calls):
            count = number - start
            own = len(call.operation) * 4 + len(call.arguments) + REQUEST_HEAD
            # Before login one at a time: nothing may be sent behind a login that is not answered.
            full = count == wire.MAX_ENTRIES or size + own > wire.MAX_TO_SERVER or not self._logged_in
            if count and full:
                yield list(calls[start:number])
                start, size = number, 0
            size += own
        if calls:
            yield list(calls[start:])

    @property
    def _logged_in(self) -> bool:
        return self._session is not None and self._session.logged_in

    def _message(self, calls: Sequence[Call]) -> Message:
        """Make calls ready to be sent in one message.  Raises RequestFailed for more than that holds."""
        numbered: dict[int, Call] = {}
        for call in calls:
            self._last_id = (self._last_id + 1) % 2**32
            numbered[self._last_id] = call
        try:
            body = wire.encode_requests(
                [wire.Request(number, call.operation, call.arguments) for number, call in numbered.items()]
            )
        except ValueError as error:
            raise RequestFailed("too_long", str(error)) from error
        if self._session is not None and len(body) > self._session.largest_message:
            raise RequestFailed(
                "too_long",
                f"a request of {len(body)} bytes, but before login {wire.MAX_BEFORE_LOGIN} is the most: log in",
            )
        return Message(numbered, body)

    @contextmanager
    def _operation(self) -> Iterator[tuple[_Session, float]]:
        """Give the session and the operation's deadline (monotonic, seconds); close on any failure."""
        if self._session is None:
            raise ConnectionLost(f"there is no connection to {self._peer}: call connect() first")
        try:
            yield self._session, time.monotonic() + self._timeout
        except TimeoutError as error:
            self.close()
            raise ConnectionLost(
                f"no answer from {self._peer} within {self._timeout:g} s: connect again, or allow more time"
            ) from error
        except (OSError, EOFError) as error:
            self.close()
            raise ConnectionLost(
                f"the connection to {self._peer} was lost ({_why(error)}): connect again; if that is refused, "
                f"this address may be timed out: {WHERE_TO_LOOK}"
            ) from error
        except BaseException:  # also Ctrl-C: half a message may be on its way
            self.close()
            raise

    def _resolve(self) -> list[_Address]:
        if self._source is None:
            family = socket.AF_UNSPEC
        else:
            family = socket.AF_INET if self._source.version == 4 else socket.AF_INET6
        try:
            found = socket.getaddrinfo(self._host, self._port, family, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that the DNS cannot hold
            raise NoConnection(
                f"no address found for {self._peer} ({_why(error)}): check the host's name"
                + (f" and that it has an address of the family of {self._source}" if self._source else "")
            ) from error
        return list(dict.fromkeys(_Address(family, address) for family, _, _, _, address in found))

    def _attempt(self, address: _Address, key: bytes, seconds: float) -> _Session:
        """Connect to one address and shake hands for one key.  Raises _AttemptFailed, NotAccepted, Refused."""
        deadline = time.monotonic() + seconds
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            try:
                sock.settimeout(_left(deadline))
                if self._source is not None:
                    self._bind(sock)
                sock.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
                )  # a request is one write: nothing to wait for
                sock.connect(address.socket_address)
            except TimeoutError as error:
                raise _AttemptFailed(_Stage.UNREACHABLE, f"no connection within {seconds:.3g} s") from error
            except ConnectionResetError as error:  # accepted and closed before connect() looked
                raise _AttemptFailed(_Stage.DROPPED, f"dropped before WELCOME: {_why(error)}") from error
            except OSError as error:
                raise _AttemptFailed(_Stage.UNREACHABLE, _why(error)) from error
            return _Session(sock, self._handshake(sock, key, deadline, seconds), self._peer)
        except BaseException:
            sock.close()
            raise

    def _bind(self, sock: socket.socket) -> None:
        try:
            local = socket.getaddrinfo(str(self._source), 0, sock.family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
            sock.bind(local[0][4])
        except OSError as error:
            raise NoConnection(
                f"cannot connect to {self._peer} from {self._source} ({_why(error)}): give an address of this machine"
            ) from error

    def _handshake(self, sock: socket.socket, key: bytes, deadline: float, seconds: float) -> noise.Transport:
        try:
            hello, pending = noise.create_hello(key, self._hello)
        except noise.NoiseError as error:
            raise NotAccepted(
                f"the known key of {self._peer} is no usable X25519 key: get the server's server.pub from its operator"
            ) from error
        try:
            _send(sock, wire.header(wire.HELLO, len(hello)) + hello, deadline)
            welcome = self._receive_welcome(sock, deadline)
        except TimeoutError as error:
            raise _AttemptFailed(_Stage.UNREACHABLE, f"connected, but no WELCOME within {seconds:.3g} s") from error
        except (OSError, EOFError) as error:
            raise _AttemptFailed(_Stage.DROPPED, f"dropped before WELCOME: {_why(error)}") from error
        try:
            payload, transport = noise.consume_welcome(pending, welcome)
        except noise.NoiseError as error:
            raise _AttemptFailed(_Stage.NOT_AUTHENTIC, "WELCOME does not authenticate") from error
        try:
            dictionary = wire.decode_welcome(payload).dictionary
        except wire.Tampered as error:
            raise self._strange(str(error)) from error
        if dictionary:  # we hold none and named none
            raise self._strange(f"it chooses the unknown dictionary {dictionary}")
        return transport

    def _receive_welcome(self, sock: socket.socket, deadline: float) -> bytes:
        """Return the Noise message of WELCOME.  Raises OSError, EOFError, NotAccepted, Refused."""
        header = _receive(sock, wire.HEADER, deadline)
        try:
            kind, length = wire.parse_header(header)
        except wire.BadFrame as error:
            raise self._strange(str(error)) from error
        if kind == wire.REFUSE and 1 <= length <= MAX_VERSIONS:
            versions = tuple(_receive(sock, length, deadline))
            raise Refused(
                f"{self._peer} speaks version {', '.join(map(str, versions))} of the protocol, not {wire.VERSION}: "
                f"install a client that fits the server's release",
                versions,
            )
        if kind != wire.WELCOME or not 32 + wire.TAG <= length <= 32 + wire.TAG + wire.MAX_PAYLOAD:
            raise self._strange(f"a frame of type {kind} and length {length}")
        return _receive(sock, length, deadline)

    def _strange(self, cause: str) -> NotAccepted:
        return NotAccepted(
            f"{self._peer} did not answer with WELCOME ({cause}): check that host and port are a tape-tracking server's"
        )

    def _failure(self, failures: dict[_Address, _AttemptFailed]) -> TapeTrackError:
        """Make the one error of all failed attempts."""
        stages = {failure.stage for failure in failures.values()}
        if len(failures) == 1:
            causes = str(*failures.values())
        else:
            causes = ", ".join(f"{address.text}: {failure}" for address, failure in failures.items())
        if _Stage.NOT_AUTHENTIC in stages:
            return NotAccepted(
                f"{self._peer} does not hold the key that is known for it ({causes}): its key has changed, or another "
                f"answers in its place; ask its operator for server.pub, then run 'tt known add {self._peer} KEY'"
            )
        if _Stage.DROPPED in stages:
            return NoConnection(
                f"no connection to {self._peer} ({causes}): this address may be timed out there, "
                f"or the known key may not be the server's: {WHERE_TO_LOOK}"
            )
        return NoConnection(
            f"no connection to {self._peer} ({causes}): check host, port and that the server runs; "
            f"else this address may be timed out there: {WHERE_TO_LOOK}"
        )


def _left(deadline: float) -> float:
    """Return the seconds until the deadline, more than 0: a time-out of 0 would mean a non-blocking socket."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(_left(deadline))
    sock.sendall(data)  # its time-out covers the whole call


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    """Return exactly `size` bytes.  Raises EOFError when the peer closed, OSError (TimeoutError at the deadline)."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        sock.settimeout(_left(deadline))  # anew for each part: who sends a byte at a time gains no time
        if not (count := sock.recv_into(view)):
            raise EOFError("closed by the server")
        view = view[count:]
    return bytes(buffer)


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
