"""A server for the client's tests that runs one script a connection, in a thread: honest, broken, slow or hostile."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tt import noise, wire
from tt.client import Client
from tt.keys import ServerKey


def new_key() -> ServerKey:
    private = X25519PrivateKey.generate()
    return ServerKey(private, private.public_key().public_bytes_raw())


class Link:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, key: ServerKey, stopped: threading.Event) -> None:
        self.sock = sock
        self.key = key
        self.stopped = stopped
        self.hello = wire.Hello(name="", version="")
        self.transport: noise.Transport
        self.messages: list[list[wire.Request]] = []  # as `converse` got them
        self.flags: list[int] = []  # of their frames

    def receive(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer where the client closed."""
        data = b""
        while len(data) < size and (part := self.sock.recv(size - len(data))):
            data += part
        return data

    def frame(self) -> tuple[bytes, bytes]:
        header = self.receive(wire.HEADER)
        return header, self.receive(int.from_bytes(header[4:], "big"))

    def accept(self, payload: bytes | None = None) -> None:
        """HELLO in, WELCOME out."""
        header, message = self.frame()
        if not header:
            raise ConnectionAbortedError("the client went without a word: its time was over")
        packed, pending = noise.consume_hello(self.key, message)
        self.hello = wire.decode_hello(packed)
        if payload is None:
            payload = wire.encode_welcome(wire.Welcome(name="peer", version="1"))
        welcome, self.transport = noise.create_welcome(pending, payload)
        self.sock.sendall(wire.header(wire.WELCOME, len(welcome)) + welcome)

    def read(self) -> bytes:
        """One plaintext; b"" where the client closed."""
        header, ciphertext = self.frame()
        return self.transport.open(header, ciphertext) if header else b""

    def seal(self, plaintext: bytes) -> bytes:
        header = wire.header(wire.DATA, len(plaintext) + wire.TAG)
        return header + self.transport.seal(header, plaintext)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def until_closed(self) -> None:
        while self.sock.recv(65536):
            pass


Script = Callable[[Link], None]


def answer_pings(link: Link) -> None:
    link.accept()
    while plaintext := link.read():
        assert plaintext == b"\0"
        link.sock.sendall(link.seal(b"\0"))


def reset_before_welcome(link: Link) -> None:
    link.reset()


def silence(link: Link) -> None:
    link.until_closed()


def send(data: bytes) -> Script:
    """A peer that reads HELLO and answers with these bytes."""

    def script(link: Link) -> None:
        link.frame()
        link.sock.sendall(data)
        link.until_closed()

    return script


def after_welcome(plaintext_to_bytes: Callable[[Link], bytes]) -> Script:
    """A peer that shakes hands, reads one frame and answers with what the function makes."""

    def script(link: Link) -> None:
        link.accept()
        link.read()
        link.sock.sendall(plaintext_to_bytes(link))
        link.until_closed()

    return script


def reply(make: Callable[[int, str, object], bytes]) -> Script:
    """A peer that answers each request with the body that `make` returns for its id, operation and arguments."""

    def answer(requests: list[wire.Request]) -> list[bytes]:
        (request,) = requests
        return [make(request.id, request.operation, msgspec.msgpack.decode(request.arguments))]

    return converse(answer)


def converse(answer: Callable[[list[wire.Request]], Iterable[bytes]]) -> Script:
    """A peer that answers each message with the bodies that `answer` gives for its requests, and pings."""

    def script(link: Link) -> None:
        link.accept()
        assembler = wire.Assembler(wire.MAX_TO_SERVER)
        logged_in = False
        while plaintext := link.read():
            link.flags.append(plaintext[0])
            if (body := assembler.feed(plaintext)) is None:
                continue
            if not body:
                link.sock.sendall(link.seal(b"\0"))
                continue
            requests = wire.decode_requests(body)
            link.messages.append([request for request in requests if isinstance(request, wire.Request)])
            for part in answer(link.messages[-1]):
                for piece in wire.split_message(part, wire.MAX_DATA, compress=logged_in):
                    link.sock.sendall(link.seal(piece))
            if link.messages[-1][0].operation == "login":
                logged_in = assembler.flags_allowed = True

    return script


def result(number: int, value: object) -> bytes:
    return wire.encode_replies([wire.Reply(number, None, msgspec.Raw(msgspec.msgpack.encode(value)))])


class Peer:
    """A listener whose n-th connection runs the n-th script, and each later one the last."""

    def __init__(self, *scripts: Script, host: str = "127.0.0.1") -> None:
        self.key = new_key()
        self.links: list[Link] = []
        self._failures: list[BaseException] = []
        self._scripts = scripts
        self._stopped = threading.Event()
        self._listener = socket.create_server((host, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def client(self, **options: object) -> Client:
        return Client("127.0.0.1", self.port, **{"key": self.key.public, **options})  # type: ignore[arg-type]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            link = Link(sock, self.key, self._stopped)
            self.links.append(link)
            script = self._scripts[min(len(self.links), len(self._scripts)) - 1]
            try:
                with sock, contextlib.suppress(ConnectionError):
                    script(link)
            except BaseException as error:  # noqa: BLE001  shown by close(), in the test's thread
                self._failures.append(error)

    def close(self) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        while self._thread.is_alive():
            for link in self.links:  # a test that failed has left its client open; the last one may just be accepted
                with contextlib.suppress(OSError):
                    link.sock.shutdown(socket.SHUT_RDWR)
            self._thread.join(0.1)
        self._listener.close()
        if self._failures:
            raise self._failures[0]
