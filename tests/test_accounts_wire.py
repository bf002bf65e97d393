"""Logins over the wire: hashes, delays, time-outs and ends of sessions in a real loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from accounts_kit import WORD, Gate, House, building
from harness import Running, reset, until, until_end

from tt.wire import Request, decode_replies, encode_requests


class Peer:
    """A connection to a server with the operations of a house."""

    def __init__(self, server: Running, source: str) -> None:
        self._server = server
        self.socket, self._transport = server.handshake(source)

    def ask(self, operation: str, **arguments: Any) -> Any:
        """The result, or the code of the error."""
        self.send(operation, **arguments)
        return self.receive()

    def send(self, operation: str, **arguments: Any) -> None:
        request = Request(1, operation, msgspec.Raw(msgspec.msgpack.encode(arguments)))
        self.socket.sendall(self._server.seal(self._transport, b"\0" + encode_requests([request])))

    def receive(self) -> Any:
        plaintext = self._server.read_plaintext(self.socket, self._transport)
        assert plaintext[0] == 0
        (reply,) = decode_replies(plaintext[1:])
        return reply.error.code if reply.error else msgspec.msgpack.decode(reply.result)


@pytest.fixture
def houses(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with building(tmp_path) as make:
        yield make


@pytest.fixture
def serve(houses, run_server) -> Callable[[], tuple[Running, House]]:
    """A server with the operations of a house; what it waits for is real time."""

    def start() -> tuple[Running, House]:
        house = houses(real_time=True, login_delay="0.5 s")
        server = run_server(house.operations)
        server.dispatcher.ended = house.accounts.ended
        for part in (house.store, house.passwords, house.accounts):
            server.server.watch(part.descriptor, lambda _readable, _writable, part=part: part.turn())
        return server, house

    return start


def test_a_session_from_login_to_logout(serve) -> None:
    server, house = serve()
    peer = Peer(server, "127.0.0.2")
    assert peer.ask("whoami") == "login_first"
    assert peer.ask("login", user="jsmith", password=WORD) == ["jsmith", False, False]
    assert peer.ask("whoami") == ["jsmith", False, "127.0.0.2", []]
    assert peer.ask("logout") is None
    assert until_end(peer.socket) == b""
    until("the session is over", lambda: house.accounts.sessions() == 0)
    server.await_closed("logged_out")


def test_an_administrator_ends_a_session_over_the_wire(serve) -> None:
    server, house = serve()
    boss, peer = Peer(server, "127.0.0.2"), Peer(server, "127.0.0.3")
    boss.ask("login", user="boss", password=WORD)
    peer.ask("login", user="jsmith", password=WORD)
    sessions = boss.ask("session.list")
    assert [entry[1:4] for entry in sessions[0]] == [["boss", "127.0.0.2", "test"], ["jsmith", "127.0.0.3", "test"]]
    assert boss.ask("session.disconnect", id=sessions[0][1][0]) is None
    assert until_end(peer.socket) == b""
    until("the session is over", lambda: house.accounts.sessions() == 1)
    assert boss.ask("user.add", user="new")[0] != ""
    assert boss.ask("user.change", user="new", disabled=True)


def test_failed_logins_are_held_back_and_end_in_a_time_out(serve) -> None:
    server, _ = serve()
    delays = []
    for word in "1234":
        peer = Peer(server, "127.0.0.2")
        began = time.monotonic()
        assert peer.ask("login", user="jsmith", password=word) == "login"
        delays.append(time.monotonic() - began)
    assert [delay >= least for delay, least in zip(delays, (0.25, 0.5, 0.5, 0.5), strict=True)] == [True] * 4
    peer = Peer(server, "127.0.0.2")
    with suppress(ConnectionError):
        peer.ask("login", user="jsmith", password="5")
    assert server.await_timed_out("127.0.0.2")["reason"] == "login_failed"
    other = Peer(server, "127.0.0.3")
    assert other.ask("login", user="jsmith", password=WORD) == ["jsmith", False, False]


def test_who_leaves_during_the_hash_or_the_delay_leaves_nothing_behind(serve) -> None:
    server, house = serve()
    for _ in range(10):
        for word in (WORD, "wrong"):
            peer = Peer(server, "127.0.0.2")
            peer.send("login", user="jsmith", password=word)
            reset(peer.socket)
    peer = Peer(server, "127.0.0.3")
    assert peer.ask("login", user="boss", password=WORD) == ["boss", True, False]
    until("only one session", lambda: house.accounts.sessions() == 1)
    until("its source is free", lambda: not house.passwords._sources)


def test_the_time_out_of_a_source_takes_its_password_out_of_the_queue(serve, monkeypatch) -> None:
    server, house = serve()
    gate = Gate(monkeypatch)
    first, second = Peer(server, "127.0.0.2"), Peer(server, "127.0.0.3")
    first.send("login", user="jsmith", password=WORD)
    until("it is in work", lambda: gate.begun)
    second.send("login", user="jsmith", password="never hashed")
    until("it waits", lambda: len(house.passwords._others) == 1)
    server.connect("127.0.0.3").sendall(b"GET / HTTP/1.1\r\n\r\n")
    until("it waits no longer", lambda: not house.passwords._others)
    gate.free.set()
    assert first.receive() == ["jsmith", False, False]
    assert gate.begun == [WORD]
